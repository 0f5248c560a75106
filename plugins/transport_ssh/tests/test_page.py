"""docs/ssh.md: its program runs, and its list of configuration keywords is right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from corefw_transport_ssh import config, connection, dial
from corefw_transport_ssh.config import find_destination

from corefw.channel import Interrupt
from corefw.net.dialing import listen_tcp
from corefw.testing.ends import receive_all
from corefw.uri import MigrationUri
from tests.helpers.sshd import Sshd

PAGE = (Path(__file__).parents[3] / "docs" / "ssh.md").read_text()


@pytest.mark.sshd
def test_its_program_runs(sshd: Sshd, home: Path) -> None:
    (home / ".ssh" / "config").write_text(f"Host far\n HostName 127.0.0.1\n Port {sshd.port}\n User {sshd.user}\n")
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    interrupt = Interrupt()
    with listen_tcp("127.0.0.1", 0, MigrationUri.parse("tcp:127.0.0.1:0")) as listener:
        port = listener.uri.rest.rpartition(":")[2]
        exec(compile(block.replace("4444", port), "docs/ssh.md", "exec"), {})
        with listener.accept(interrupt) as channel:
            assert receive_all(channel) == b"hello"
    interrupt.close()


def test_its_keywords_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(config.__file__).read_text()
    section = PAGE.partition("## ~/.ssh/config")[2].partition("\n## ")[0]
    keywords = set(re.findall(r"`([A-Z]\w+)`", section)) - {"Host", "Match", "Include"}
    assert {keyword.lower() for keyword in keywords} == set(re.findall(r'found(?:\.get\(|\[|, )"(\w+)"', source))
    monkeypatch.setenv("HOME", str(tmp_path))
    files = find_destination("me", "host", None).identity_files
    assert [file.name for file in files] == re.findall(r"\bid_\w+", PAGE)[:3]
    for seconds in (config.CONNECT_SECONDS, connection.NEGOTIATION_SECONDS, connection.AUTHENTICATION_SECONDS):
        assert f" {seconds:.0f} s" in PAGE
    assert f"for {dial.SILENCE_MILLISECONDS // 1000} s counts as lost" in PAGE
