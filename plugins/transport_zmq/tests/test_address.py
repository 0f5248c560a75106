"""Parsing of URIs and their options."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq.auth
from corefw_transport_zmq import ZmqTransport
from corefw_transport_zmq.address import Place, parse_address

from corefw.channel import Interrupt, TransportContext
from corefw.errors import ChannelError, UriError
from corefw.uri import MigrationUri, TcpAddress, UnixAddress

RIGHT: dict[str, Place] = {
    "zmq:tcp://host:4444": TcpAddress("host", 4444),
    "zmq:tcp://[::1]:0": TcpAddress("::1", 0),
    "zmq:tcp://*:4444": TcpAddress("", 4444),
    "zmq:tcp://*:*": TcpAddress("", 0),
    "zmq:tcp://:4444": TcpAddress("", 4444),
    "zmq:ipc:///run/a.sock": UnixAddress("/run/a.sock"),
    "zmq:ipc://relative": UnixAddress("relative"),
    "zmq:ipc://@name": UnixAddress("@name"),
}

WRONG = {
    "zmq:host:1": "expected zmq:tcp://HOST:PORT or zmq:ipc://PATH",
    "zmq:inproc://a": "expected zmq:tcp://HOST:PORT",
    "zmq:tcp://a": "has no port",
    "zmq:tcp://a;b:1": "'a;b' is not a host name",
    "zmq:tcp://a:1?": "unknown option ''",
    "zmq:tcp://a:1?hwm=3": "unknown option 'hwm', expected key, server-key, authorized",
    "zmq:tcp://a:1?key": "option 'key' needs a value",
    "zmq:tcp://a:1?key=a&key=b": "is given twice",
    "zmq:tcp://a:1?server-key=s": "needs key=FILE too",
    "zmq:ipc://*": "expected a path",
    "zmq:ipc:///" + "x" * 107: "a UNIX socket's can have 107",
}


@pytest.mark.parametrize("text", RIGHT)
def test_places(text: str) -> None:
    assert parse_address(MigrationUri.parse(text)).place == RIGHT[text]


@pytest.mark.parametrize("text", WRONG)
def test_wrong_uris_say_what_would_be_right(text: str) -> None:
    with pytest.raises(UriError) as caught:
        ZmqTransport(MigrationUri.parse(text), TransportContext())
    assert WRONG[text] in str(caught.value) and "\n" not in str(caught.value)


def test_options_may_hold_any_byte() -> None:
    address = parse_address(MigrationUri.parse("zmq:tcp://a:1?key=/a%20b%26c+d"))
    assert address.options == {"key": "/a b&c+d"}
    assert str(address.at(TcpAddress("a", 7))) == "zmq:tcp://a:7?key=/a%20b%26c+d"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    zmq.auth.create_certificates(tmp_path, "one")
    (tmp_path / "in").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "in" / "one.key").write_bytes((tmp_path / "one.key").read_bytes())
    (tmp_path / "damaged").write_text('curve\n    public-key = "short"\n')
    return tmp_path


WRONG_KEYS = {
    "key={0}/one.key&server-key={0}/one.key": "has no secret half (it is the *.key_secret file)",
    "key={0}/one.key_secret": "expected server-key=FILE to dial or authorized=DIR to wait",
    "key={0}/nowhere&server-key={0}/one.key": "cannot use the certificate",
    "key={0}/one.key_secret&server-key={0}/damaged": "is not a ZeroMQ certificate",
    "key={0}/one.key_secret&authorized={0}/one.key": "is not a directory",
    "key={0}/one.key_secret&authorized={0}/empty": "there is no *.key file",
}


@pytest.mark.parametrize("query", WRONG_KEYS)
def test_wrong_keys(keys: Path, query: str) -> None:
    with pytest.raises(UriError) as caught:
        ZmqTransport(MigrationUri.parse(f"zmq:tcp://a:1?{query.format(keys)}"), TransportContext())
    assert WRONG_KEYS[query] in str(caught.value)


def test_which_end_the_keys_are_for(keys: Path) -> None:
    dials = ZmqTransport(
        MigrationUri.parse(f"zmq:tcp://127.0.0.1:1?key={keys}/one.key_secret&server-key={keys}/one.key"),
        TransportContext(),
    )
    waits = ZmqTransport(
        MigrationUri.parse(f"zmq:tcp://127.0.0.1:1?key={keys}/one.key_secret&authorized={keys}/in"), TransportContext()
    )
    assert (dials.features.outgoing, dials.features.incoming) == (True, False)
    assert (waits.features.outgoing, waits.features.incoming) == (False, True)
    interrupt = Interrupt()
    with pytest.raises(ChannelError, match="to dial, server-key=FILE"):
        waits.connect(interrupt)
    with pytest.raises(ChannelError, match="to wait, authorized=DIR"):
        dials.listen()
    interrupt.close()
