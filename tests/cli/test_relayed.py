"""How a relay for a QEMU ends, with the test itself as the QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import pytest

from corefw.channel import Channel, Interrupt, Listener, receive_exactly
from corefw.client.routes import QemuRelay
from corefw.plugins import Plugins
from corefw.qmp.client import QmpClient
from corefw.testing.ends import receive_all, same
from corefw.testing.tasks import Possessions, Task, wait_until
from corefw.uri import TcpAddress
from corefw.wire.constants import ReturnMessage
from corefw.wire.returnpath import encode_return_message, number_body

PLUGINS = Plugins()
NEVER = Interrupt()
"""An interrupt that is never set."""


class NoClient:
    """A QMP connection over TCP, which cannot carry descriptors, so that the QEMU has to dial."""

    address = TcpAddress("localhost", 1)


def qemu_relay(uri: str) -> QemuRelay:
    return QemuRelay(PLUGINS.transport(uri), cast(QmpClient, NoClient()))


def finish(relay: QemuRelay, answer: dict[str, str]) -> str | None:
    """Finish a migration that had a return path; return the error."""
    return relay.finish(answer, return_path=True, interrupted=lambda: False)


@pytest.fixture
def far() -> Iterator[Listener]:
    before = Possessions.now()
    with PLUGINS.transport("tcp:127.0.0.1:0").listen() as listener:
        yield listener
    before.assert_no_more()


def begin(relay: QemuRelay, far: Listener) -> tuple[Channel, Channel]:
    """The ends of the QEMU and the destination, after a part of the stream has gone through."""
    qemu = PLUGINS.transport(relay.uri).connect(NEVER)
    destination = far.accept(NEVER)
    qemu.send(b"the stream")
    receive_exactly(destination, memoryview(bytearray(10)))
    return qemu, destination


def shut(status: int, qemu: Channel, destination: Channel) -> None:
    """Let the destination send SHUT and the QEMU close its end."""
    destination.send(encode_return_message(ReturnMessage.SHUT, number_body(status)))
    receive_exactly(qemu, memoryview(bytearray(8)))
    qemu.close()


def test_when_the_guest_has_moved_the_far_side_sees_an_end(far: Listener) -> None:
    with qemu_relay(str(far.uri)) as relay:
        qemu, destination = begin(relay, far)
        shut(0, qemu, destination)
        finishing = Task("finish", finish, relay, {"status": "completed"})
        finishing.let_block()
        assert finishing.running, "the destination has not ended its answers yet"
        destination.send_eof()
        assert finishing.result() is None
    same(Task("the end", receive_all, destination).result(), b"")
    destination.close()


def test_what_the_destination_says_explains_a_failure(far: Listener) -> None:
    with qemu_relay(str(far.uri)) as relay:
        qemu, destination = begin(relay, far)
        shut(1, qemu, destination)
        destination.close()
        answer = {"status": "failed", "error-desc": "Unable to write to socket: Bad file descriptor"}
        why = finish(relay, answer)
        assert why == "the destination reported that it failed to load the guest (its log says why)"


@pytest.mark.parametrize("asked", [True, False])
def test_who_cancelled_it(far: Listener, asked: bool) -> None:
    """The relay's failure is reported if it caused the cancel, but not if a user cancelled."""
    with qemu_relay(str(far.uri)) as relay:
        qemu, destination = begin(relay, far)
        destination.abort()
        destination.close()
        assert wait_until(relay.has_failed) if asked else wait_until(lambda: relay._relay.failure is not None)
        qemu.close()
        why = finish(relay, {"status": "cancelled"})
        assert why == (f"the side of {far.uri} broke: {far.uri}: the peer reset the connection" if asked else None)
