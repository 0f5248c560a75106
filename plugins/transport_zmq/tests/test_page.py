"""docs/zmq.md: its programs run, and its table agrees with the protocol."""

from __future__ import annotations

import re
from pathlib import Path

from corefw_transport_zmq.keys import OPTIONS, load_keys
from corefw_transport_zmq.protocol import CHUNK, VERSION, WINDOW, Kind

PAGE = (Path(__file__).parents[3] / "docs" / "zmq.md").read_text()


def test_its_programs_run(tmp_path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/zmq.md", "exec"), {"folder": tmp_path})
    (tmp_path / "friends").mkdir()
    (tmp_path / "friends" / "src.key").write_bytes((tmp_path / "dst.key").read_bytes())
    assert load_keys({"key": f"{tmp_path}/dst.key_secret", "authorized": f"{tmp_path}/friends"}, "zmq:tcp://*:1")


def test_its_tables_are_the_code_s() -> None:
    rows = re.findall(r"^\| (\d+) \| ([A-Z]+) \|", PAGE, re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [(kind.value, kind.name) for kind in Kind]
    assert tuple(re.findall(r"^\| `([a-z-]+)=\w+` \|", PAGE, re.MULTILINE)) == OPTIONS
    assert f"The protocol, version {VERSION}" in PAGE
    assert f"1 to {CHUNK} bytes" in PAGE and f"at least {CHUNK}" in PAGE and f"{WINDOW >> 20} MiB" in PAGE
