"""Parsing of URIs."""

from __future__ import annotations

import pytest
from corefw_transport_ssh import SshTransport
from corefw_transport_ssh.address import SshAddress, parse_address

from corefw.channel import TransportContext
from corefw.errors import ChannelError, UriError
from corefw.uri import MigrationUri, TcpAddress, UnixAddress

RIGHT = {
    "ssh://host/tcp:a:1": SshAddress(None, "host", None, TcpAddress("a", 1)),
    "ssh://me@host:2222/tcp:[::1]:80": SshAddress("me", "host", 2222, TcpAddress("::1", 80)),
    "ssh://[fe80::1%eth0]:22/tcp::4444": SshAddress(None, "fe80::1%eth0", 22, TcpAddress("", 4444)),
    "ssh://[::1]/unix:/run/a.sock": SshAddress(None, "::1", None, UnixAddress("/run/a.sock")),
    "ssh://my-alias/unix:/a:b/c": SshAddress(None, "my-alias", None, UnixAddress("/a:b/c")),
}

WRONG = {
    "ssh:host/tcp:a:1": "expected ssh://[USER@]HOST[:PORT]/tcp:HOST:PORT",
    "ssh://host": "does not name a target on the remote host",
    "ssh:///tcp:a:1": "names no host",
    "ssh://me:secret@host/tcp:a:1": "no passwords here",
    "ssh://@host/tcp:a:1": "'' is not a user name",
    "ssh://$(id)@host/tcp:a:1": "'$(id)' is not a user name",
    "ssh://ho st/tcp:a:1": "'ho st' is not a host name",
    "ssh://-oX/tcp:a:1": "'-oX' is not a host name",
    "ssh://host:x/tcp:a:1": "'x' is not a port",
    "ssh://host/exec:true": "expected tcp:HOST:PORT or unix:PATH",
    "ssh://host/tcp:a": "has no port",
    "ssh://host/unix:a.sock": "expected the absolute path",
}


@pytest.mark.parametrize("text", RIGHT)
def test_parts(text: str) -> None:
    address = parse_address(MigrationUri.parse(text))
    assert address == RIGHT[text]
    assert str(address.with_target(address.target)) == text


@pytest.mark.parametrize("text", WRONG)
def test_wrong_uris_say_what_would_be_right(text: str) -> None:
    with pytest.raises(UriError) as caught:
        SshTransport(MigrationUri.parse(text), TransportContext())
    assert WRONG[text] in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_far_unix_socket_cannot_be_waited_at() -> None:
    transport = SshTransport(MigrationUri.parse("ssh://host/unix:/run/a.sock"), TransportContext())
    assert not transport.features.incoming
    with pytest.raises(ChannelError, match=r"use tcp:HOST:PORT"):
        transport.listen()
