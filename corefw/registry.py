"""The savers or loaders of one migration, by the keys of their sections, and in the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from corefw.errors import PluginError
from corefw.section import LiveLoader, LiveSaver, Section, SectionKey, SectionLoader, SectionSaver, StateSaver

_AnySection = TypeVar("_AnySection", bound=Section)


class _Registry(Generic[_AnySection]):
    """Sections by their keys, of which no two are alike."""

    def __init__(self, sections: Iterable[_AnySection] = ()) -> None:
        self._by_key: dict[SectionKey, _AnySection] = {}
        for section in sections:
            self.add(section)

    def add(self, section: _AnySection) -> None:
        """Raise PluginError if another section has its key."""
        if section.key in self._by_key:
            raise PluginError(f"two plugins claim section {section.key}: give one of them another instance_id")
        self._by_key[section.key] = section

    def find(self, key: SectionKey) -> _AnySection | None:
        """The section with this key, if there is one."""
        return self._by_key.get(key)


class SaverRegistry(_Registry[SectionSaver]):
    """The savers of one migration, in the order of the stream."""

    def __iter__(self) -> Iterator[SectionSaver]:
        return iter(sorted(self._by_key.values(), key=lambda saver: -saver.priority))

    def live(self) -> list[LiveSaver]:
        return [saver for saver in self if isinstance(saver, LiveSaver)]

    def state(self) -> list[StateSaver]:
        return [saver for saver in self if isinstance(saver, StateSaver)]


class LoaderRegistry(_Registry[SectionLoader]):
    """The loaders of one migration, in the order in which they were registered."""

    def __iter__(self) -> Iterator[SectionLoader]:
        return iter(self._by_key.values())

    def live(self) -> list[LiveLoader]:
        return [loader for loader in self if isinstance(loader, LiveLoader)]
