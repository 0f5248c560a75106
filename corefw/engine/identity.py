"""Proves that a new connection joins the two sides of the same migration.

A destination that is a migfw gives its source, if that is one too, a secret before any RAM is sent (MIGFW_SECRET). Over
each connection that the source makes from then on, each side first shows that it knows the secret, in bytes that are no
part of the migration stream:

    source        what the connection is for ("MGRC", "MGRP"), nonce
    destination   nonce, HMAC of "destination" and both nonces
    source        HMAC of "source" and both nonces

The nonces are new each time, so what a stranger has overheard at a wrong address is of no use at the right one; and the
proof for one purpose is none for the other. Without a secret, because one side is a QEMU, the stream goes on at once,
and all that can be checked is how it does.

Threads: whichever owns the connection.
"""

from __future__ import annotations

import hmac
import secrets
from enum import Enum
from typing import Final

from corefw.channel import Channel, receive_exactly
from corefw.errors import ChannelError, StreamError
from corefw.wire.constants import SECRET_LENGTH, Command, SectionType
from corefw.wire.stream import StreamReader

NONCE_LENGTH: Final = 16
PROOF_LENGTH: Final = 32

ANSWER: Final = 20.0
"""Seconds that a destination has to answer, which it does in a thread of its own."""

FIRST_COMMANDS: Final = frozenset({Command.PING, Command.RECV_BITMAP, Command.POSTCOPY_RESUME})
"""What the stream of a QEMU may go on with."""


class Purpose(bytes, Enum):
    """What a connection is for, by the bytes with which it begins."""

    STREAM = b"MGRC"
    """The stream goes on over it (recovery.py)."""
    REQUESTED = b"MGRP"
    """It brings requested pages (preempt.py)."""


_SUBJECTS: Final = {Purpose.STREAM: b"", Purpose.REQUESTED: b"requested pages "}
"""What stands before the side in a proof."""


_HINTS: Final = {
    Purpose.STREAM: "",
    Purpose.REQUESTED: " over the channel of requested pages (an older migfw does not: switch 'postcopy-preempt' off)",
}


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_LENGTH)


def _proof(secret: bytes, purpose: Purpose, side: bytes, source_nonce: bytes, destination_nonce: bytes) -> bytes:
    return hmac.digest(secret, _SUBJECTS[purpose] + side + source_nonce + destination_nonce, "sha256")


def prove_source(channel: Channel, secret: bytes, purpose: Purpose) -> None:
    """The source's part. Raises ChannelError if it is not its destination that answers."""
    ours = secrets.token_bytes(NONCE_LENGTH)
    channel.send(purpose.value, ours)
    if not channel.wait_readable(ANSWER):
        raise ChannelError(f"{channel.peer}: the destination did not answer within {ANSWER:g} s{_HINTS[purpose]}")
    answer = bytearray(NONCE_LENGTH + PROOF_LENGTH)
    receive_exactly(channel, memoryview(answer))
    theirs, proof = bytes(answer[:NONCE_LENGTH]), bytes(answer[NONCE_LENGTH:])
    if not hmac.compare_digest(proof, _proof(secret, purpose, b"destination", ours, theirs)):
        raise ChannelError(f"{channel.peer}: expected the destination of this migration, got another one's answer")
    channel.send(_proof(secret, purpose, b"source", ours, theirs))


def check_source(channel: Channel, secret: bytes) -> Purpose:
    """The destination's part: what the connection is for. Receives no byte of what comes behind the proof. Raises
    StreamError, ChannelError if it is not its source that has connected."""
    head = _receive(channel, len(Purpose.STREAM))
    if head not in _SUBJECTS:
        raise StreamError(f"expected the source of this migration, got {_shown(head)}")
    purpose = Purpose(head)
    theirs, ours = _receive(channel, NONCE_LENGTH), secrets.token_bytes(NONCE_LENGTH)
    channel.send(ours, _proof(secret, purpose, b"destination", theirs, ours))
    if not hmac.compare_digest(_receive(channel, PROOF_LENGTH), _proof(secret, purpose, b"source", theirs, ours)):
        raise StreamError("expected the source of this migration, got another one's")
    return purpose


def _receive(channel: Channel, count: int) -> bytes:
    """Exactly `count` bytes, or fewer if they are the last."""
    received = bytearray(count)
    got = 0
    while got < count and (more := channel.receive_into(memoryview(received)[got:])):
        got += more
    return bytes(received[:got])


def check_first_command(reader: StreamReader) -> None:
    """The destination's part where there is no secret: raise StreamError if this is no stream that goes on. Looks at
    what has come and waits for no more: what may follow the first byte is checked where it is loaded. As in QEMU, the
    status is postcopy-recover from that byte on."""
    reader.peek(1)
    start, end = reader.span()
    head = bytes(reader.buffer[start : min(end, start + 3)])
    is_other = len(head) == 3 and int.from_bytes(head[1:]) not in FIRST_COMMANDS
    if head[:1] != bytes((SectionType.COMMAND,)) or is_other:
        raise StreamError(f"expected a source that resumes, got {_shown(head)}")


def _shown(head: bytes) -> str:
    return f"the bytes {head.hex(' ')}" if head else "the end of the connection"
