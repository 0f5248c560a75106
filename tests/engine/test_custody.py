"""Which side may run the guest: it never runs twice, and never stays stopped needlessly, whatever the commands are."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from corefw.channel import Buffer, Channel, Interrupt, Listener, Transport, TransportContext, TransportFeatures
from corefw.engine import Engine
from corefw.engine.returnpath import ReturnPathReader
from corefw.errors import ChannelError, MigfwError, StateError
from corefw.hookspecs import hookimpl
from corefw.machine import RunState, VerifiableMachine
from corefw.memory.blocks import MemfdBlock
from corefw.net.dialing import connect_tcp
from corefw.net.sockets import SocketChannel
from corefw.plugins import Plugins
from corefw.states import MigrationStatus
from corefw.uri import MigrationUri
from corefw.wire.constants import ReturnMessage
from tests.helpers.engines import PATIENCE, Pair, Peer, arrived, counting, ended, query_migrate, runs_on
from tests.helpers.machines import CountingMachine
from tests.helpers.qemu import wait_until

END_OF_DESCRIPTION = b"}]}"


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


def sent_all(pair: Pair, peer: Peer) -> Engine:
    """A source whose destination has everything and has not answered yet."""
    source = pair.source()
    source.migrate(peer.uri)
    peer.accept()
    peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
    return source


# -- a guest that moved ------------------------------------------------------------------------------------------------


def test_a_guest_that_moved_moves_no_second_time(pair: Pair) -> None:
    """Otherwise a copy would arrive, or, if that failed, the guest would be started here again."""
    source, destination = pair.source(), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    with pytest.raises(StateError, match="the guest has moved"):
        source.migrate("tcp:127.0.0.1:1")
    assert source.outgoing.status == "completed"
    with pytest.raises(StateError, match="the guest has moved"):
        source.cont()
    runs_on(destination)


def test_a_guest_that_may_run_elsewhere_is_not_sent_again(pair: Pair, peer: Peer) -> None:
    source = sent_all(pair, peer)
    source.cancel()
    assert ended(source) == "cancelled" and source.machine.run_state is RunState.POSTMIGRATE
    with pytest.raises(StateError, match="paused due to previous migration"):
        source.migrate("tcp:127.0.0.1:1")
    source.cont()  # the user knows that it does not run there
    source.migrate("tcp:127.0.0.1:1")
    assert ended(source) == "failed"
    runs_on(source)


def test_a_cancel_that_comes_too_late_waits_for_the_confirmation(
    pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest runs at the destination, so `cancelled` would be wrong."""
    monkeypatch.setattr("corefw.engine.source.LAST_WORDS", PATIENCE)
    source = sent_all(pair, peer)
    source.cancel()
    assert source.outgoing.status == "cancelling"
    peer.say(ReturnMessage.SHUT, 0)
    assert ended(source) == "completed"
    assert source.machine.run_state is RunState.POSTMIGRATE and counting(source).starts == 1


def test_and_for_the_word_that_it_failed(pair: Pair, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corefw.engine.source.LAST_WORDS", PATIENCE)
    source = sent_all(pair, peer)
    source.cancel()
    peer.say(ReturnMessage.SHUT, 1)
    assert ended(source) == "cancelled"
    runs_on(source)


# -- cont while the migration holds the guest --------------------------------------------------------------------------


def test_cont_waits_for_the_end_of_a_cancel(pair: Pair, peer: Peer) -> None:
    """A cancel has begun, but the destination has everything, so its answer decides."""
    source = sent_all(pair, peer)
    source.outgoing.advance(MigrationStatus.ACTIVE, MigrationStatus.CANCELLING)
    with pytest.raises(StateError, match="stopped for the switchover"):
        source.cont()
    peer.say(ReturnMessage.SHUT, 0)
    assert ended(source) == "completed"
    assert source.machine.run_state is RunState.POSTMIGRATE and counting(source).starts == 1


class Hasty(CountingMachine):
    """Asks to start the guest at the moment when the source has given it up."""

    engine: Engine | None = None

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    def set_run_state(self, state: RunState) -> None:
        super().set_run_state(state)
        if state is RunState.POSTMIGRATE and self.engine is not None:
            try:
                self.engine.cont()
            except StateError as error:
                self.refused.append(str(error))


@pytest.mark.parametrize("return_path", [True, False])
def test_cont_is_refused_until_the_status_says_the_end(pair: Pair, return_path: bool) -> None:
    machine = Hasty()
    source, destination = pair.source(machine), pair.destination()
    source.set_capabilities({"return-path": return_path})
    machine.engine = source
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    assert machine.refused and machine.starts == 1


def test_nobody_asks_a_guest_that_is_held(pair: Pair) -> None:
    class Verifying(CountingMachine, VerifiableMachine):
        def verify(self) -> dict[str, object]:
            return {"writes": self.check()}

    source, destination = pair.source(Verifying()), pair.destination()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert source.outgoing.wait(frozenset({MigrationStatus.PRE_SWITCHOVER}), PATIENCE)
    with pytest.raises(StateError, match="stopped for the switchover"):
        source.verify()
    source.cancel()
    assert ended(source) == "cancelled"
    source.stop()
    assert source.verify() == {"writes": counting(source).check()}


def test_cancel_does_not_wait_for_a_guest_that_verifies_itself(pair: Pair) -> None:
    """The switchover needs the guest lock, which the verification holds for a long time."""
    begun, go_on = threading.Event(), threading.Event()

    class Slow(CountingMachine, VerifiableMachine):
        def verify(self) -> dict[str, object]:
            begun.set()
            assert go_on.wait(PATIENCE)
            return {}

    source, destination = pair.source(Slow()), pair.destination()
    verifying = threading.Thread(target=source.verify)
    verifying.start()
    try:
        assert begun.wait(PATIENCE)
        source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
        wait_until(lambda: query_migrate(source).get("ram", {}).get("dirty-sync-count", 0) > 1, "the second pass")
        source.cancel()
        assert ended(source) == "cancelled"
    finally:
        go_on.set()
        verifying.join()
    runs_on(source)


# -- what the destination says -----------------------------------------------------------------------------------------


def test_shut_0_counts_only_when_everything_was_sent(pair: Pair, peer: Peer) -> None:
    source = pair.source()
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(peer.uri)
    peer.accept()
    peer.say(ReturnMessage.SHUT, 0)
    assert ended(source) == "failed"
    assert "before everything was sent" in query_migrate(source)["error-desc"]
    runs_on(source)


class Broken(Channel):
    """A channel of a transport with a bug."""

    peer = "broken"
    has_return_path = True

    def send(self, *parts: Buffer) -> None:
        pass

    def receive_into(self, view: memoryview) -> int:
        raise RuntimeError("a bug")

    def wait_readable(self, seconds: float) -> bool:
        return True

    def send_eof(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_bug_on_the_return_path_is_no_yes() -> None:
    path = ReturnPathReader(Broken(), lambda: None)
    path.expect(ReturnMessage.SHUT, 0)
    path.start()
    path.wait_end(PATIENCE)
    assert not path.accepted
    with pytest.raises(MigfwError, match="RuntimeError: a bug"):
        path.check()


class LateBreak(SocketChannel):
    """Breaks after everything was sent and the destination has answered."""

    def send(self, *parts: Buffer) -> None:
        super().send(*parts)
        if bytes(parts[-1]).endswith(END_OF_DESCRIPTION):
            wait_until(lambda: not any(one.name == "return path" for one in threading.enumerate()), "SHUT")
            raise ChannelError("the connection broke")


class LateBreakTransport(Transport):
    features = TransportFeatures(return_path=True, multi_channel=True)

    def connect(self, interrupt: Interrupt) -> Channel:
        port = int(self.uri.rest.rpartition(":")[2])
        channel = connect_tcp("127.0.0.1", port, self.uri, interrupt)
        channel.__class__ = LateBreak
        return channel

    def listen(self) -> Listener:
        raise AssertionError


class LateBreakPlugin:
    @hookimpl
    def corefw_transport(self, uri: MigrationUri, context: TransportContext) -> Transport | None:
        return LateBreakTransport(uri, context) if uri.scheme == "late" else None


@pytest.mark.parametrize(("status", "end"), [(0, "completed"), (1, "failed")])
def test_an_answer_that_came_counts_also_where_sending_failed(peer: Peer, status: int, end: str) -> None:
    plugins = Plugins.load()
    plugins.register(LateBreakPlugin())
    with Pair(plugins) as pair:
        source = pair.source()
        source.migrate(peer.uri.replace("tcp", "late"))
        peer.accept()
        peer.read_all(lambda data: data.endswith(END_OF_DESCRIPTION))
        peer.say(ReturnMessage.SHUT, status)
        assert ended(source) == end
        if status:
            runs_on(source)
        else:
            assert source.machine.run_state is RunState.POSTMIGRATE
            with pytest.raises(StateError, match="the guest has moved"):
                source.cont()


def test_a_return_path_that_breaks_while_the_guest_is_being_stopped(pair: Pair, peer: Peer) -> None:
    """The failure must not be missed on the way into pre-switchover, where the source would then wait for ever."""

    class Stopping(CountingMachine):
        def stop(self, state: RunState) -> None:
            if state is RunState.FINISH_MIGRATE and peer.connection is not None:
                peer.connection.close()
                wait_until(lambda: not any(one.name == "return path" for one in threading.enumerate()), "the break")
            super().stop(state)

    source = pair.source(Stopping())
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(peer.uri)
    peer.accept()
    assert ended(source) == "failed"
    runs_on(source)


# -- machines that break their contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit("no")], ids=["a bug", "sys.exit"])
def test_whatever_a_machine_raises_is_a_failure_and_the_guest_runs_on(pair: Pair, error: BaseException) -> None:
    class Troubled(CountingMachine):
        def ram_blocks(self) -> Sequence[MemfdBlock]:
            if self.starts:
                raise error
            return super().ram_blocks()

    source, destination = pair.source(Troubled()), pair.destination()
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "failed"
    assert f"{type(error).__name__}: no" in query_migrate(source)["error-desc"]
    runs_on(source)


def test_a_guest_that_cannot_be_started_again_does_not_keep_the_migration_from_ending(pair: Pair) -> None:
    class Stubborn(CountingMachine):
        def start(self) -> None:
            if self.starts:
                raise RuntimeError("no")
            super().start()

    source, destination = pair.source(Stubborn()), pair.destination(CountingMachine(incoming=True, instances=2))
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "failed"
    assert "could not be started again: no" in query_migrate(source)["error-desc"]


def test_a_guest_that_runs_on_the_destination_is_the_destinations_whatever_else_goes_wrong(pair: Pair) -> None:
    """SHUT 1 would make the source start it as well."""

    class Troubled(CountingMachine):
        def start(self) -> None:
            super().start()
            raise RuntimeError("somebody who watches the guest failed")

    source, destination = pair.source(), pair.destination(Troubled(incoming=True))
    source.migrate(destination.migrate_incoming("tcp:127.0.0.1:0"))
    assert ended(source) == "completed" and arrived(destination) == "completed"
    assert counting(source).starts == 1
    runs_on(destination)


def test_a_closed_engine_starts_nothing(pair: Pair) -> None:
    source, destination = pair.source(), pair.destination()
    source.stop()
    source.close()
    destination.close()
    with pytest.raises(StateError, match="closed"):
        source.cont()
    with pytest.raises(StateError, match="closed"):
        source.migrate("tcp:127.0.0.1:1")
    with pytest.raises(StateError, match="closed"):
        destination.migrate_incoming("tcp:127.0.0.1:0")
