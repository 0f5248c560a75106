"""CURVE: encryption and authorization.

    key=FILE          our own certificate with its secret half; both ends need one
    server-key=FILE   dialing: the public certificate of the listener, so that no one can impersonate it
    authorized=DIR    listening: a folder with the public certificates of authorized peers, one *.key file each

Invariant: with a key, both sides are authenticated; there is no encryption without authentication. Options name files,
so a URI contains no secret. The files are ZeroMQ certificates, as `zmq.auth.create_certificates` writes them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq
from zmq.auth import load_certificate

from corefw.errors import ChannelError, UriError

log = logging.getLogger(__name__)

OPTIONS: Final = ("key", "server-key", "authorized")

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
"""Endpoint at which libzmq asks about each peer (RFC 27)."""

_Z85_LENGTH: Final = 40


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys as text (Z85). `server` and `authorized` are None if not given."""

    public: bytes
    secret: bytes
    server: bytes | None
    authorized: frozenset[bytes] | None


def load_keys(options: Mapping[str, str], uri: object) -> Keys | None:
    """Read the files that the options name; None without options. Raises UriError."""
    if not options:
        return None
    if "key" not in options:
        raise UriError(f"'{uri}': {' and '.join(options)} needs key=FILE too, our own certificate with its secret half")
    public, secret = _load(options["key"], uri)
    if secret is None:
        raise UriError(f"'{uri}': {options['key']} has no secret half (it is the *.key_secret file)")
    server = _load(options["server-key"], uri)[0] if "server-key" in options else None
    authorized = _load_folder(options["authorized"], uri) if "authorized" in options else None
    if server is None and authorized is None:
        raise UriError(f"'{uri}': expected server-key=FILE to dial or authorized=DIR to wait, beside key=FILE")
    return Keys(public, secret, server, authorized)


def _load(name: str, uri: object) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(Path(name).expanduser())
    except (OSError, ValueError) as error:
        raise UriError(f"'{uri}': cannot use the certificate {name}: {error}") from None
    if any(key is not None and len(key) != _Z85_LENGTH for key in (public, secret)):
        raise UriError(f"'{uri}': {name} is not a ZeroMQ certificate: a key has {_Z85_LENGTH} characters")
    return public, secret


def _load_folder(name: str, uri: object) -> frozenset[bytes]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise UriError(f"'{uri}': authorized={name} is not a directory")
    found = frozenset(_load(str(file), uri)[0] for file in sorted(folder.glob("*.key")))
    if not found:
        raise UriError(f"'{uri}': there is no *.key file in {name}, so no peer could connect")
    return found


def secure_dialler(socket: zmq.Socket[bytes], keys: Keys | None, uri: object) -> None:
    """Raises ChannelError."""
    if keys is None:
        return
    if keys.server is None:
        raise ChannelError(f"{uri}: to dial, server-key=FILE has to name the listener's public certificate")
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_serverkey = keys.server


def secure_listener(socket: zmq.Socket[bytes], keys: Keys, uri: object) -> Gatekeeper:
    """Raises ChannelError. The hub has to serve what is returned."""
    if keys.authorized is None:
        raise ChannelError(f"{uri}: to wait, authorized=DIR has to hold the public certificates of those who may dial")
    gatekeeper = Gatekeeper(socket.context, keys.authorized)
    socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.curve_server = True
    socket.zap_domain = b"migfw"
    return gatekeeper


class Gatekeeper:
    """Answers libzmq's question whether a peer is authorized. Used by the hub's thread only."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], authorized: frozenset[bytes]) -> None:
        self._authorized = {zmq.utils.z85.decode(key) for key in authorized}
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind(ZAP_ENDPOINT)

    def answer(self) -> None:
        """Answer one request: version, request id, domain, address, identity, mechanism, credentials."""
        version, request, _, address, _, mechanism, *credentials = self.socket.recv_multipart()
        known = mechanism == b"CURVE" and len(credentials) == 1 and credentials[0] in self._authorized
        if not known:
            log.warning("zmq: refused a peer at %s: its key is not among the authorized ones", address.decode())
        status, text = (b"200", b"OK") if known else (b"400", b"key not authorized")
        self.socket.send_multipart([version, request, status, text, b"", b""])
