"""Proves that a new connection joins the two sides of the same migration.

A destination that is a migfw gives its source, if that is one too, a secret before any RAM is sent (MIGFW_SECRET). Over
a connection that replaces a broken one, each side first shows that it knows the secret, in bytes that are no part of
the migration stream:

    source        "MGRC", nonce
    destination   nonce, HMAC of "destination" and both nonces
    source        HMAC of "source" and both nonces

The nonces are new each time, so what a stranger has overheard at a wrong address is of no use at the right one. Without
a secret, because one side is a QEMU, the stream goes on at once, and all that can be checked is how it does.

Threads: whichever owns the connection.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Final

from corefw.channel import Channel, receive_exactly
from corefw.errors import ChannelError, StreamError
from corefw.wire.constants import SECRET_LENGTH, Command, SectionType
from corefw.wire.stream import StreamReader

MAGIC: Final = b"MGRC"
NONCE_LENGTH: Final = 16
PROOF_LENGTH: Final = 32

FIRST_COMMANDS: Final = frozenset({Command.PING, Command.RECV_BITMAP, Command.POSTCOPY_RESUME})
"""What the stream of a QEMU may go on with."""


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_LENGTH)


def _proof(secret: bytes, side: bytes, source_nonce: bytes, destination_nonce: bytes) -> bytes:
    return hmac.digest(secret, side + source_nonce + destination_nonce, "sha256")


def prove_source(channel: Channel, secret: bytes) -> None:
    """The source's part. Raises ChannelError if it is not its destination that answers."""
    ours = secrets.token_bytes(NONCE_LENGTH)
    channel.send(MAGIC, ours)
    answer = bytearray(NONCE_LENGTH + PROOF_LENGTH)
    receive_exactly(channel, memoryview(answer))
    theirs, proof = bytes(answer[:NONCE_LENGTH]), bytes(answer[NONCE_LENGTH:])
    if not hmac.compare_digest(proof, _proof(secret, b"destination", ours, theirs)):
        raise ChannelError(f"{channel.peer}: expected the destination of this migration, got another one's answer")
    channel.send(_proof(secret, b"source", ours, theirs))


def check_source(reader: StreamReader, channel: Channel, secret: bytes | None) -> None:
    """The destination's part. Raises StreamError, ChannelError if it is not its source that has connected."""
    if secret is None:
        _check_first_command(reader)
        return
    if (head := reader.peek(len(MAGIC))) != MAGIC:
        raise StreamError(f"expected the source of this migration, got {_shown(head)}")
    reader.read(len(MAGIC), "the magic number")
    theirs, ours = reader.read(NONCE_LENGTH, "a nonce"), secrets.token_bytes(NONCE_LENGTH)
    channel.send(ours, _proof(secret, b"destination", theirs, ours))
    if not hmac.compare_digest(reader.read(PROOF_LENGTH, "a proof"), _proof(secret, b"source", theirs, ours)):
        raise StreamError("expected the source of this migration, got another one's")


def _check_first_command(reader: StreamReader) -> None:
    """Look at what has come and wait for no more: what may follow the first byte is checked where it is loaded. As in
    QEMU, the status is postcopy-recover from that byte on."""
    reader.peek(1)
    start, end = reader.span()
    head = bytes(reader.buffer[start : min(end, start + 3)])
    is_other = len(head) == 3 and int.from_bytes(head[1:]) not in FIRST_COMMANDS
    if head[:1] != bytes((SectionType.COMMAND,)) or is_other:
        raise StreamError(f"expected a source that resumes, got {_shown(head)}")


def _shown(head: bytes) -> str:
    return f"the bytes {head.hex(' ')}" if head else "the end of the connection"
