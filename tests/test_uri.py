"""MigrationUri and HOST:PORT: what parses, and the errors for what does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefw.errors import UriError, UsageError, one_line
from corefw.uri import MigrationUri, check_dialled_port, join_host_port, split_host_port


@pytest.mark.parametrize(
    ("text", "scheme", "rest"),
    [
        ("tcp:10.0.0.7:4444", "tcp", "10.0.0.7:4444"),
        ("unix:/run/a b.sock", "unix", "/run/a b.sock"),
        ("ssh://me@host:22/tcp:localhost:1", "ssh", "//me@host:22/tcp:localhost:1"),
        ("zmq:tcp://host:1", "zmq", "tcp://host:1"),
        ("exec:gzip -c > x\ny", "exec", "gzip -c > x\ny"),
        ("x-9.y+z:q", "x-9.y+z", "q"),
        ("zstd+tcp:10.0.0.7:4444", "zstd+tcp", "10.0.0.7:4444"),
    ],
)
def test_a_uri_is_a_scheme_and_the_rest(text: str, scheme: str, rest: str) -> None:
    uri = MigrationUri.parse(text)
    assert (uri.scheme, uri.rest) == (scheme, rest)
    assert str(uri) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a migration URI: expected SCHEME:ADDRESS"),
        ("host", "'host' is not a migration URI: expected SCHEME:ADDRESS"),
        (":4444", "':4444' is not a migration URI"),
        ("TCP:host:1", "'TCP:host:1' is not a migration URI"),
        ("/path:1", "'/path:1' is not a migration URI"),
        ("tcp:", "'tcp:' has no address: expected something after 'tcp:'"),
        ("file:/tmp/\udcff", "'file:/tmp/\\xff' is not a migration URI: a URI has to be UTF-8"),
        ("file:/tmp/\ud800", "'file:/tmp/\\ud800' is not a migration URI: a URI has to be UTF-8"),
    ],
)
def test_what_is_no_uri_is_refused_with_an_example(text: str, message: str) -> None:
    with pytest.raises(UriError) as caught:
        MigrationUri.parse(text)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, UsageError)


def test_a_layer_stands_on_another_uri() -> None:
    uri = MigrationUri.parse("a+b+tcp:10.0.0.7:4444")
    assert uri.drivers() == ("a+b+tcp", "a+")
    assert str(uri.below_layer()) == "b+tcp:10.0.0.7:4444"
    assert uri.below_layer().with_layer("a") == uri
    assert MigrationUri.parse("tcp:10.0.0.7:4444").drivers() == ("tcp",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zstd:host:1", r"'zstd:host:1': expected zstd\+URI, as in zstd\+tcp:HOST:PORT"),
        ("zstd+:host:1", r"'zstd\+:host:1': expected zstd\+URI"),
        ("zstd+9p:x", "'9p:x' is not a migration URI"),
    ],
)
def test_a_layer_with_nothing_below(text: str, message: str) -> None:
    with pytest.raises(UriError, match=message):
        MigrationUri.parse(text).below_layer()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("example.org:4444", ("example.org", 4444)),
        ("10.0.0.7:0", ("10.0.0.7", 0)),
        ("[::1]:4444", ("::1", 4444)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
        (":65535", ("", 65535)),
        ("[]:1", ("", 1)),
    ],
)
def test_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert split_host_port(text, f"tcp:{text}") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("example.org", "'tcp:example.org' has no port: expected HOST:PORT"),
        ("[::1]", "'tcp:[::1]' has no port"),
        ("[::1:4", "'tcp:[::1:4' has no port"),
        ("::1:4", "'tcp:::1:4': put an IPv6 address in brackets, as in [::1]:4"),
        ("//h:4", "'tcp://h:4': tcp: takes no //, expected tcp:h:4"),
        ("h:65536", "'tcp:h:65536': '65536' is not a port, expected a number from 0 to 65535"),
        ("h:-1", "'tcp:h:-1': '-1' is not a port"),
        ("h:http", "'tcp:h:http': 'http' is not a port"),
        ("h:", "'tcp:h:': '' is not a port"),
        ("h:²", "'tcp:h:²': '²' is not a port"),  # a digit to str.isdigit, a ValueError to int
    ],
)
def test_what_is_no_host_and_port(text: str, message: str) -> None:
    with pytest.raises(UriError) as caught:
        split_host_port(text, f"tcp:{text}")
    assert str(caught.value).startswith(message)


@given(
    host=st.one_of(st.ip_addresses().map(str), st.from_regex(r"[a-z0-9.-]*", fullmatch=True)),
    port=st.integers(0, 65535),
)
def test_joining_is_the_inverse_of_splitting(host: str, port: int) -> None:
    assert split_host_port(join_host_port(host, port), "") == (host, port)


@given(st.text())
def test_any_text_is_a_uri_or_a_uri_error(text: str) -> None:
    try:
        uri = MigrationUri.parse(text)
        split_host_port(uri.rest, text)
    except UriError as error:
        assert one_line(text) in str(error)


def test_port_0_is_for_who_listens() -> None:
    check_dialled_port(1, "tcp:localhost:1")
    with pytest.raises(UriError, match=r"^'tcp:localhost:0': port 0 is only for listening, expected the port that "):
        check_dialled_port(0, "tcp:localhost:0")
