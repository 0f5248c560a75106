"""`with` for everything that has close().

The law: the end of the block closes, however the block ended; what close() raises, if anything, is its own contract.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """A subclass defines close()."""

    __slots__ = ()

    def close(self) -> None:
        raise AssertionError("a subclass defines close()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
