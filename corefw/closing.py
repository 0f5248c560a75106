"""The base class of everything that is closed at the end of a `with` block."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Closing:
    """Calls the subclass's close() at the end of a `with` block, however the block ended."""

    __slots__ = ()

    def close(self) -> None:
        raise AssertionError("a subclass defines close()")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
