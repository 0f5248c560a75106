"""Limits for an incoming machine: bytes of RAM, and RAM blocks, which take a descriptor each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from corefw.errors import MachineError, UsageError
from corefw.memory import host
from corefw.quantities import format_size, parse_size
from corefw.wire.constants import TARGET_PAGE_SIZE

RAM_LIMIT: Final = "ram-limit"
BLOCK_LIMIT: Final = "block-limit"
OPTIONS: Final[Mapping[str, str]] = {
    RAM_LIMIT: "the most RAM that an incoming machine may have, such as 4G (default: the free memory of this host)",
    BLOCK_LIMIT: "the most RAM blocks that it may have (default: as many as the limit on open files allows)",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The user's limits; None: whatever the host can spare when the machine arrives."""

    ram: int | None = None
    blocks: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Raises UsageError naming the option."""
        for name in options:
            if name not in OPTIONS:
                raise UsageError(f"machine 'qemu' has no option '{name}': expected {', '.join(OPTIONS)}")
        ram = _parsed(options, RAM_LIMIT, parse_size)
        if ram is not None and ram < TARGET_PAGE_SIZE:
            raise UsageError(f"option '{RAM_LIMIT}' expects at least one page of {TARGET_PAGE_SIZE} bytes, got {ram}")
        return cls(ram, _parsed(options, BLOCK_LIMIT, _positive))

    def now(self) -> Room:
        """The limits for a machine that arrives now."""
        return Room(
            ram=self.ram if self.ram is not None else host.spare_memory(),
            blocks=self.blocks if self.blocks is not None else host.spare_descriptors(),
            ram_because="allowed" if self.ram is not None else "that this host has free",
            blocks_because="allowed" if self.blocks is not None else "that the limit on open files allows",
        )


@dataclass(frozen=True, slots=True)
class Room:
    """The maximum for one machine, with the reasons as phrases for errors."""

    ram: int
    blocks: int
    ram_because: str
    blocks_because: str

    def check(self, blocks: int, ram: int) -> None:
        """Raise MachineError if a machine with that many RAM blocks and bytes of RAM is too large."""
        if blocks > self.blocks:
            raise MachineError(
                f"cannot make {blocks} RAM blocks: more than the {self.blocks} {self.blocks_because}"
                f" (raise it with --opt {BLOCK_LIMIT}=N and 'ulimit -n')"
            )
        if ram > self.ram:
            raise MachineError(
                f"cannot make {format_size(ram)} of RAM: more than the {format_size(self.ram)} {self.ram_because}"
                f" (raise it with --opt {RAM_LIMIT}=SIZE)"
            )


def _parsed(options: Mapping[str, str], name: str, parse: Callable[[str], int]) -> int | None:
    if name not in options:
        return None
    try:
        return parse(options[name])
    except UsageError as error:
        raise UsageError(f"option '{name}': {error}") from None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise UsageError(f"expected a number above zero, got '{text}'")
    return int(text)
