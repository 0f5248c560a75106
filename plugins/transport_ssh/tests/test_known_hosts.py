"""known_hosts files: the forms of a line, and which keys are accepted."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest
from corefw_transport_ssh.known_hosts import (
    HostIdentity,
    check_host_key,
    fingerprint,
    known_kinds,
    read_known_hosts,
)

from corefw.errors import ChannelError
from tests.helpers.sshd import make_key, missing_programs

KEY, OTHER = b"the key of the host", b"the key of somebody else"
KIND = "ssh-ed25519"
HOST = HostIdentity("Host.example", 2222)


def line(hosts: str, blob: bytes = KEY, kind: str = KIND, marker: str = "") -> str:
    return f"{marker} {hosts} {kind} {base64.b64encode(blob).decode()} a comment\n".lstrip()


def check(folder: Path, text: str, host: HostIdentity = HOST, kind: str = KIND) -> None:
    file = folder / "known_hosts"
    file.write_text(text)
    check_host_key(host, kind, KEY, read_known_hosts([file, folder / "missing"]), [file])


@pytest.mark.parametrize(
    "hosts",
    [
        "[host.example]:2222",
        "a,[host.example]:2222,b",
        "[*.example]:2222",
        "[HOST.example]:2222",
        "[hos?.example]:2222",
        "host.example",  # a line without a port speaks for all of them
    ],
)
def test_known(tmp_path: Path, hosts: str) -> None:
    check(tmp_path, "# comment\n\nnonsense\n" + line("elsewhere", OTHER) + line(hosts))


def test_port_22_and_alias(tmp_path: Path) -> None:
    check(tmp_path, line("plain"), HostIdentity("plain", 22))
    check(tmp_path, line("the-name"), HostIdentity("plain", 2222, "the-name"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        line("[host.example]:2223"),
        line("*,!*host.example*"),
        line("[host.example]:2222", marker="@cert-authority"),
        "[host.example]:2222 ssh-ed25519 not-base64!\n",
        "|1|damaged ssh-ed25519 AAAA\n",
    ],
)
def test_unknown(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    with pytest.raises(ChannelError) as caught:
        check(tmp_path, text)
    assert "is not known" in str(caught.value)
    assert fingerprint(KEY) in str(caught.value)
    assert f"ssh-keyscan -p 2222 Host.example >> {tmp_path}/known_hosts" in str(caught.value)


def test_unknown_under_an_alias(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="accept it with: ssh plain"):
        check(tmp_path, "", HostIdentity("plain", 22, "the-name"))


@pytest.mark.parametrize("kind", [KIND, "ssh-rsa"])
def test_changed(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ChannelError) as caught:
        check(tmp_path, "\n" + line("[host.example]:2222", OTHER), kind=kind)
    text = str(caught.value)
    assert "HAS CHANGED" in text
    assert f"{tmp_path}/known_hosts:2 has ssh-ed25519 {fingerprint(OTHER)}" in text
    assert f"ssh-keygen -f {tmp_path}/known_hosts -R '[host.example]:2222'" in text


def test_one_of_several_keys(tmp_path: Path) -> None:
    check(tmp_path, line("[host.example]:2222", OTHER, "ssh-rsa") + line("[host.example]:2222"))


def test_revoked(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match=r"IS REVOKED .*known_hosts:2"):
        check(tmp_path, line("[host.example]:2222") + line("*", marker="@revoked"))


def test_kinds_to_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(line("plain", OTHER, "ssh-rsa") + line("plain") + line("other", kind="ecdsa-sha2-nistp256"))
    assert known_kinds(HostIdentity("plain", 22), read_known_hosts([file])) == ["ssh-rsa", KIND]


@pytest.mark.skipif(bool(missing_programs()), reason=f"needs OpenSSH: {', '.join(missing_programs())}")
def test_hashed_names_and_fingerprints_are_openssh_s(tmp_path: Path) -> None:
    public = make_key(tmp_path / "key").with_suffix(".pub")
    kind, blob = public.read_text().split()[:2]
    file = tmp_path / "known_hosts"
    file.write_text(f"[host.example]:2222 {kind} {blob}\n")
    subprocess.run(["ssh-keygen", "-H", "-f", file], check=True, capture_output=True)
    assert file.read_text().startswith("|1|")
    check_host_key(HOST, kind, base64.b64decode(blob), read_known_hosts([file]), [file])
    with pytest.raises(ChannelError, match="is not known"):
        check_host_key(HostIdentity("other", 2222), kind, base64.b64decode(blob), read_known_hosts([file]), [file])
    shown = subprocess.run(["ssh-keygen", "-lf", public], check=True, capture_output=True, text=True).stdout
    assert fingerprint(base64.b64decode(blob)) in shown
