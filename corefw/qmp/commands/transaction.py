"""`transaction`: several changes of dirty bitmaps, all of them or none. Names and texts are QEMU's (7.2 to 11.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NotRequired, TypedDict

from corefw.qmp.commands import block
from corefw.qmp.commands.context import Context
from corefw.qmp.protocol import QmpError
from corefw.qmp.schema import Variants

if TYPE_CHECKING:
    from corefw.block import BlockNode


class BlockDirtyBitmapAdd(TypedDict):
    node: str
    name: str
    granularity: NotRequired[int]
    persistent: NotRequired[bool]
    disabled: NotRequired[bool]


class BlockDirtyBitmapMerge(TypedDict):
    node: str
    target: str
    bitmaps: list[str | block.BlockDirtyBitmap]


class Abort(TypedDict):
    """No members."""


class AbortWrapper(TypedDict):
    data: Abort


class BlockDirtyBitmapAddWrapper(TypedDict):
    data: BlockDirtyBitmapAdd


class BlockDirtyBitmapWrapper(TypedDict):
    data: block.BlockDirtyBitmap


class BlockDirtyBitmapMergeWrapper(TypedDict):
    data: BlockDirtyBitmapMerge


TransactionAction = Annotated[
    dict[str, Any],
    Variants(
        "TransactionAction",
        "type",
        {
            "abort": AbortWrapper,
            "block-dirty-bitmap-add": BlockDirtyBitmapAddWrapper,
            "block-dirty-bitmap-remove": BlockDirtyBitmapWrapper,
            "block-dirty-bitmap-clear": BlockDirtyBitmapWrapper,
            "block-dirty-bitmap-enable": BlockDirtyBitmapWrapper,
            "block-dirty-bitmap-disable": BlockDirtyBitmapWrapper,
            "block-dirty-bitmap-merge": BlockDirtyBitmapMergeWrapper,
        },
    ),
]
TransactionProperties = TypedDict(
    "TransactionProperties", {"completion-mode": NotRequired[Literal["individual", "grouped"]]}
)


_INDIVIDUAL: Final[TransactionProperties] = {"completion-mode": "individual"}


def _abort(_: Context) -> None:
    raise QmpError("Transaction aborted using Abort action")


ACTIONS: Final[Mapping[str, Callable[..., None]]] = {
    "abort": _abort,
    "block-dirty-bitmap-add": block.block_dirty_bitmap_add,
    "block-dirty-bitmap-remove": block.block_dirty_bitmap_remove,
    "block-dirty-bitmap-clear": block.block_dirty_bitmap_clear,
    "block-dirty-bitmap-enable": block.block_dirty_bitmap_enable,
    "block-dirty-bitmap-disable": block.block_dirty_bitmap_disable,
    "block-dirty-bitmap-merge": block.block_dirty_bitmap_merge,
}


@contextmanager
def _all_or_nothing(nodes: Sequence[BlockNode]) -> Iterator[None]:
    """Hold the locks of these nodes during the block. If it raises, their bitmaps become what they were before it."""
    with ExitStack() as stack:
        for node in sorted(nodes, key=lambda node: node.name):
            stack.enter_context(node.settled())
        restore = [node.snapshot() for node in nodes]
        try:
            yield
        except BaseException:
            for one in restore:
                one()
            raise


def transaction(
    context: Context, actions: Sequence[TransactionAction], properties: TransactionProperties = _INDIVIDUAL
) -> None:
    """Change dirty bitmaps in several ways, all of them or, on an error, none, between two writes of the guest."""
    mode = properties.get("completion-mode", "individual")
    with _all_or_nothing(block.nodes(context)):
        for action in actions:
            kind = action["type"]
            if mode != "individual" and kind != "abort":
                raise QmpError(f"Action '{kind}' does not support Transaction property completion-mode = {mode}")
            ACTIONS[kind](context, **action["data"])
