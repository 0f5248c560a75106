"""docs/qemu-versions.md lists the table of differences between QEMU's versions, as it is in the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from corefw.wire.constants import Command, RamFlag
from corefw.wire.versions import DIFFERENCES, UNASKED_ACK, Version, is_known, machine_version

PAGE = Path(__file__).parents[2] / "docs" / "qemu-versions.md"


def test_the_page_has_each_difference_once_in_order() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| what |")]
    expected = [f"| {one.name} | {one.depends} | {one.versions()} | {one.what} | {one.migfw} |" for one in DIFFERENCES]
    assert rows == expected


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("pc-i440fx-7.2", Version(7, 2)),
        ("pc-q35-10.0", Version(10, 0)),
        ("s390-ccw-virtio-8.1", Version(8, 1)),
        ("microvm", None),
        ("pc-q35-rhel9.4.0", None),
        ("", None),
    ],
)
def test_the_version_of_a_machine_type(name: str, version: Version | None) -> None:
    assert machine_version(name) == version


def test_both_bounds_belong_to_a_difference() -> None:
    assert not is_known(Command.SWITCHOVER_START, Version(9, 2)) and is_known(Command.SWITCHOVER_START, Version(10, 0))
    assert is_known(RamFlag.COMPRESS_PAGE, Version(9, 0)) and not is_known(RamFlag.COMPRESS_PAGE, Version(9, 1))
    assert UNASKED_ACK.holds(Version(11, 0)) and not UNASKED_ACK.holds(Version(11, 1))
    assert is_known(Command.PING, Version(2, 5)), "what no difference is about"
