"""The section 'globalstate': the run state of the source's guest, so that a paused one stays paused.

The run state is stored before the guest is stopped for the migration, and sent as a buffer of fixed length with a NUL
after the name. An unknown name is refused. Source: QEMU 7.2, migration/global_state.c.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from corefw.wire.vmstate import Buffer, Kind, Refused, Scalar, VMState

SECTION: Final = "globalstate"
RUNSTATE_SIZE: Final = 100
UNREMARKABLE: Final = frozenset({"running", "paused"})
"""States that may be left out: the destination's own setting (autostart) then decides whether the guest starts."""


class GlobalState:
    """The contents of the section.

    known      the names of run states that may arrive
    always     send it in any state (property store-global-state)
    runstate   the name stored on the source, or received
    received   whether it came in the stream
    """

    def __init__(self, known: Collection[str], *, always: bool) -> None:
        self.known = known
        self.always = always
        self.runstate: str = ""
        self.received = False
        self.size = 0
        self.padded = bytes(RUNSTATE_SIZE)

    def needed(self) -> bool:
        return self.always or self.runstate not in UNREMARKABLE

    def encode(self) -> None:
        """Fill the buffer before saving."""
        name = self.runstate.encode()
        assert len(name) < RUNSTATE_SIZE, "no run state's name is that long"
        self.size = len(name) + 1
        self.padded = name.ljust(RUNSTATE_SIZE, b"\0")

    def decode(self, _version_id: int) -> None:
        """Read the buffer after loading. Raises Refused. Ignores what follows the NUL: flags in QEMU 8.2 and later."""
        name, nul, _ = bytes(self.padded).partition(b"\0")
        if not nul:
            raise Refused(
                f"a run state's name of at most {RUNSTATE_SIZE - 1} bytes", f"{len(name)} bytes without a NUL"
            )
        if self.size != len(name) + 1:
            raise Refused(f"size {len(name) + 1} for run state {name!r}", f"size {self.size}")
        text = name.decode(errors="replace")
        if text not in self.known:
            raise Refused(f"one of the run states {', '.join(sorted(self.known))}", f"'{text}'")
        self.runstate = text
        self.received = True


GLOBAL_STATE: Final = VMState(
    SECTION,
    version_id=1,
    fields=(Scalar("size", Kind.U32), Buffer("runstate", RUNSTATE_SIZE, attribute="padded")),
    needed=GlobalState.needed,
    pre_save=GlobalState.encode,
    post_load=GlobalState.decode,
)
