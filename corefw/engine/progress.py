"""What of a stream has been loaded so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from corefw.registry import LoaderRegistry
from corefw.section import SectionKey, SectionLoader
from corefw.wire.records import Configuration, SectionHeader


@dataclass(slots=True)
class LoadProgress:
    """The sections of one incoming stream.

    loaders              everything that can be loaded
    configuration        the stream's configuration section, if it has one
    live_ids             the id of each live section, in the order of their STARTs
    opened               live sections between START and END
    loaded               sections that came to their end
    passes_began         a PART came
    switchover_started   SWITCHOVER_START came
    """

    loaders: LoaderRegistry
    configuration: Configuration | None = None
    live_ids: dict[SectionKey, int] = field(default_factory=dict)
    opened: dict[SectionKey, SectionHeader] = field(default_factory=dict)
    loaded: set[SectionKey] = field(default_factory=set)
    passes_began: bool = False
    switchover_started: bool = False

    def is_known(self, key: SectionKey) -> bool:
        return self.loaders.find(key) is not None

    def is_loaded(self, loader: SectionLoader) -> bool:
        return loader.key in self.loaded

    def end_live_sections(self) -> None:
        """The first device comes: the live sections have ended, with an END or, in a background snapshot, without (QEMU
        6.0 and later, bg_migration_thread)."""
        self.loaded |= self.opened.keys()
        self.opened.clear()
