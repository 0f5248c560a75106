"""What ~/.ssh/config adds to a URI."""

from __future__ import annotations

from pathlib import Path

import pytest
from corefw_transport_ssh import config
from corefw_transport_ssh.config import find_destination

from corefw.errors import ChannelError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$HOME/.ssh, without the system's own settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSH_AUTH_SOCK", "/agent")
    monkeypatch.setattr(config, "SYSTEM_CONFIG", str(tmp_path / "ssh_config"))
    (tmp_path / ".ssh").mkdir()
    return tmp_path / ".ssh"


def test_defaults(folder: Path) -> None:
    found = find_destination("me", "host", None)
    assert (found.host, found.port, found.user, found.agent) == ("host", 22, "me", "/agent")
    assert found.identity_files[0] == folder / "id_ed25519"
    assert found.known_hosts[0] == folder / "known_hosts"
    assert find_destination(None, "host", 2200).port == 2200


def test_an_alias_and_what_the_uri_says_before_it(folder: Path) -> None:
    (folder / "config").write_text(
        "Host far\n HostName 10.0.0.7\n User guest\n Port 2222\n IdentityFile ~/.ssh/far_key\n IdentityFile %d/second\n"
        " IdentitiesOnly yes\n UserKnownHostsFile ~/a ~/b\n HostKeyAlias far-key\n IdentityAgent ~/own\n"
        " ConnectTimeout 3\nHost *\n User nobody\n"
    )
    found = find_destination(None, "far", None)
    assert (found.alias, found.host, found.port, found.user) == ("far", "10.0.0.7", 2222, "guest")
    assert found.identity_files == (folder / "far_key", folder.parent / "second")
    assert found.identities_only
    assert found.known_hosts[:2] == (folder.parent / "a", folder.parent / "b")
    assert (found.key_name, found.agent, found.connect_seconds) == ("far-key", str(folder.parent / "own"), 3)
    other = find_destination("me", "far", 22)
    assert (other.user, other.port) == ("me", 22)
    assert find_destination(None, "elsewhere", None).user == "nobody"


def test_the_way_there(folder: Path) -> None:
    (folder / "config").write_text(
        "Host a\n ProxyCommand nc %h %p\nHost b\n ProxyJump one,me@two:2222\n"
        "Host c\n ProxyJump none\n ProxyCommand none\n"
    )
    assert find_destination(None, "a", 2200).proxy_command == "nc a 2200"
    assert find_destination(None, "b", None).proxy_jump == ("one", "me@two:2222")
    last = find_destination(None, "c", None)
    assert (last.proxy_jump, last.proxy_command) == ((), None)


def test_included_files(folder: Path) -> None:
    (folder / "config.d").mkdir()
    (folder / "config.d" / "1").write_text("Host far\n HostName included\n")
    (folder / "config").write_text("Host near\n Include config.d/*\n Port 2222\nHost *\n User last\n")
    assert find_destination(None, "far", None).host == "included"
    assert find_destination(None, "far", None).port == 22
    assert find_destination(None, "near", None).port == 2222


def test_an_include_in_a_circle(folder: Path) -> None:
    (folder / "config").write_text("Include config\n")
    with pytest.raises(ChannelError, match="includes itself"):
        find_destination(None, "far", None)


@pytest.mark.parametrize(
    "text", ["Port\n", "Port many\n", "Match exec true\n User x\n", "Host far\n ConnectTimeout x\n"]
)
def test_files_that_cannot_be_used(folder: Path, text: str) -> None:
    (folder / "config").write_text(text)
    with pytest.raises(ChannelError) as caught:
        find_destination(None, "far", None)
    assert "\n" not in str(caught.value)
