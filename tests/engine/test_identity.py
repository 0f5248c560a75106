"""The proof that two sides belong to the same migration, over a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from corefw.channel import Channel, receive_exactly
from corefw.engine import identity
from corefw.engine.identity import Purpose, check_source, new_secret, prove_source
from corefw.errors import ChannelError, MigfwError
from corefw.net.sockets import SocketChannel

SECRET = new_secret()


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (SocketChannel(end, "unix:a") for end in socket.socketpair())
    with one, other:
        yield one, other


@pytest.mark.parametrize("purpose", Purpose)
def test_what_it_is_for_is_known_and_nothing_behind_it_is_taken(
    ends: tuple[Channel, Channel], purpose: Purpose
) -> None:
    source, destination = ends
    with ThreadPoolExecutor() as pool:
        proof = pool.submit(prove_source, source, SECRET, purpose)
        assert check_source(destination, SECRET) is purpose
        proof.result()
    source.send(b"a page")
    received = bytearray(6)
    receive_exactly(destination, memoryview(received))
    assert received == b"a page"


@pytest.mark.parametrize("purpose", Purpose)
def test_another_secret_convinces_neither_side(ends: tuple[Channel, Channel], purpose: Purpose) -> None:
    source, destination = ends
    with ThreadPoolExecutor() as pool:
        check = pool.submit(check_source, destination, new_secret())
        with pytest.raises(MigfwError, match="another one's answer"):
            prove_source(source, SECRET, purpose)
        source.close()
        with pytest.raises(MigfwError, match="source of this migration"):
            check.result()


def test_a_proof_for_one_purpose_is_none_for_the_other(ends: tuple[Channel, Channel]) -> None:
    """An attacker in between changes the purpose of the connection."""
    source, destination = ends
    with ThreadPoolExecutor() as pool:
        proof = pool.submit(prove_source, source, SECRET, Purpose.STREAM)
        head = bytearray(4 + 16)
        receive_exactly(destination, memoryview(head))
        near, far = (SocketChannel(end, "unix:b") for end in socket.socketpair())
        with near, far:
            check = pool.submit(check_source, far, SECRET)
            near.send(Purpose.REQUESTED.value, head[4:])
            answer = bytearray(16 + 32)
            receive_exactly(near, memoryview(answer))
            destination.send(answer)
            with pytest.raises(MigfwError, match="another one's answer"):
                proof.result()
        with pytest.raises(MigfwError):
            check.result()


@pytest.mark.parametrize("purpose", Purpose)
def test_a_destination_that_does_not_answer_is_given_up(
    ends: tuple[Channel, Channel], purpose: Purpose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older migfw takes the proof for the beginning of pages that it does not read yet."""
    monkeypatch.setattr(identity, "ANSWER", 0.1)
    with pytest.raises(ChannelError, match=r"did not answer within 0\.1 s") as raised:
        prove_source(ends[0], SECRET, purpose)
    assert ("postcopy-preempt" in str(raised.value)) is (purpose is Purpose.REQUESTED)
