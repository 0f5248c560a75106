"""The state of one outgoing migration, shared by its phases; to savers, the context that setup() is given.

Threads: the migration thread, unless a method says otherwise.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from corefw.channel import Channel, Interrupt, Transport, TransportFeatures
from corefw.engine.custody import Custody
from corefw.engine.framing import SectionWriter
from corefw.engine.guestlock import GuestLock
from corefw.engine.limits import Limits
from corefw.engine.link import LAST_WORDS, Link
from corefw.engine.meter import Meter
from corefw.engine.pagerequests import PageRequests
from corefw.engine.passes import Passes
from corefw.engine.postcopy_start import PostcopyStart
from corefw.engine.preempt import ANSWER, RequestedSender, open_requested
from corefw.engine.preempt import CAPABILITY as PREEMPT
from corefw.engine.reconnection import Reconnection
from corefw.engine.returnpath import Handler
from corefw.engine.statistics import OutgoingStatistics
from corefw.engine.tails import tail_of
from corefw.errors import MachineError, PluginError, StateError
from corefw.machine import DEAD, Machine, ThrottlableMachine
from corefw.postcopy import OnDemandSaver, PostcopySaver
from corefw.registry import SaverRegistry
from corefw.section import LiveSaver, OutgoingContext
from corefw.settings import Settings
from corefw.wire.constants import PACKAGE_PING, PLUGIN_MESSAGES, Command, ReturnMessage
from corefw.wire.records import write_command
from corefw.wire.returnpath import ReturnMessageRecord
from corefw.wire.stream import StreamReader


def _pass_body(handler: Callable[[bytes], None], message: ReturnMessageRecord, _: StreamReader) -> None:
    handler(message.body)


class Source(OutgoingContext):
    """One attempt to send the guest away.

    live         the live savers whose setup() was called: those to iterate, to complete and to clean up
    transport    what it dials, or dialled last
    link         the present connection; a migration that resumes gets a new one
    proceed      set to leave pre-switchover
    reconnection when a postcopy that is paused goes on by itself
    confirmed    the destination said that it has the guest
    postcopy     whether and why to switch to postcopy
    stopped_at   time.monotonic() when the guest began to be stopped for the switchover
    left_at      time.monotonic() when it was handed over in postcopy; None before, and in precopy
    requests     the page requests over the present link, in postcopy
    released     some of the guest's memory was given back to the host: it cannot run here again
    requested    the channel of requested pages over the present link; None if they have none of their own
    all_sent     everything was sent in postcopy, over this connection or one before it
    secret       what the destination, a migfw, knows of this migration in postcopy (identity.py); else None
    """

    sections: SectionWriter
    requests: PageRequests
    requested: RequestedSender | None = None

    def __init__(
        self,
        machine: Machine,
        settings: Settings,
        savers: SaverRegistry,
        transport: Transport,
        guest_lock: GuestLock,
        on_pass: Callable[[int], None],
    ) -> None:
        self.machine = machine
        self.settings = settings
        self.savers = savers
        self.transport = transport
        self.interrupt = Interrupt()
        self.meter = Meter(settings, self.check)
        self.link = Link(transport, self.interrupt, self.meter, settings)
        self.statistics = OutgoingStatistics(
            self.meter, expected_downtime=settings.integer("downtime-limit"), savers=tuple(savers)
        )
        self.tail = tail_of(machine)
        self.custody = Custody(machine, guest_lock, self.tail.advice)
        self.live: list[LiveSaver] = []
        self.limits = Limits(settings)
        self.postcopy = PostcopyStart(settings)
        self.passes = Passes(
            machine,
            self.live,
            settings,
            self.statistics,
            self.meter,
            self.limits,
            self.check,
            on_pass,
            self.postcopy,
        )
        self.proceed = threading.Event()
        self.confirmed = False
        self.released = False
        self.stopped_at = 0.0
        self.left_at: float | None = None
        self.secret: bytes | None = None
        self.all_sent = False
        self._started_there = False
        self._is_same_destination = True
        self.reconnection = Reconnection(settings)
        self.statistics.reconnection = self.reconnection
        self._resuming = threading.Lock()  # guards the next
        self._next_transport: Transport | None = None  # the user's, or that one again
        self._resumed = threading.Event()

    def check(self) -> None:
        """Raise if the migration was cancelled or has already failed. Any thread."""
        self.interrupt.check()
        self.link.check()
        if self.left_at is None:  # later on its RAM matters, and not the process here
            self.check_guest()

    def check_guest(self) -> None:
        """Raise MachineError if the guest has ended. Any thread."""
        if self.machine.run_state in DEAD:
            raise MachineError(f"the guest ended during the migration ({self.machine.run_state})")

    def open_return_path(self) -> None:
        """Ask the destination for a return path, and begin to read it. Raises PluginError; see
        read_return_path()."""
        self.read_return_path()
        self.link.answers.handle(ReturnMessage.MIGFW_SECRET, self._note_secret)
        write_command(self.link.writer, Command.OPEN_RETURN_PATH)

    def _note_secret(self, message: ReturnMessageRecord, _: StreamReader) -> None:
        self.secret = message.body

    def read_return_path(self, *, may_end: bool = False) -> None:
        """Begin to read the return path of the present link; `may_end`: the first message may be SHUT 0. Raises
        PluginError if a saver claims a message that another one has, or that is not for plugins."""
        self.link.read_return_path(self._plugin_messages(), self.return_path_failed, may_end=may_end)

    def open_requested_early(self) -> None:
        """A PING 1 was sent: if it is not answered, the destination may want the channel of requested pages before it
        reads anything. Raises ChannelError."""
        if self.settings.capability(PREEMPT) and not self.link.answers.wait(ReturnMessage.PONG, 1, ANSWER):
            self.requested = open_requested(self.link, None)

    def open_requested(self) -> None:
        """Open the channel of requested pages, if they are to have one, now that it is known whether the destination is
        a migfw. Raises ChannelError."""
        if not self.settings.capability(PREEMPT):
            return
        early, self.requested = self.requested, None
        if early is not None and self.secret is not None:
            early.close()
            early = None
        self.requested = early or open_requested(self.link, self.secret)

    def _plugin_messages(self) -> dict[int, Handler]:
        found: dict[int, Handler] = {}
        for saver in self.savers:
            for number, handler in saver.return_messages().items():
                if number not in PLUGIN_MESSAGES or number in found:
                    raise PluginError(f"section {saver.key}: return-path message {number:#x} is not free for it")
                found[number] = partial(_pass_body, handler)
        return found

    def downtime(self) -> int:
        """Milliseconds for which the guest was stopped."""
        end = time.monotonic() if self.left_at is None else self.left_at
        return int((end - self.stopped_at) * 1000)

    @property
    def refused(self) -> bool:
        """Whether it is known that the destination does not run the guest, since it reported that it failed.

        After RUN another destination's SHUT 1 says nothing about that (QEMU's may mean the link); a migfw that gives a
        reason never started the guest.
        """
        path = self.link.return_path
        if self.released:  # a destination that lies; nothing of the guest is here to be started again
            return False
        return path is not None and self.has_failed_there and (path.explained or not self.started_there)

    @property
    def has_failed_there(self) -> bool:
        """Whether the destination reported that it failed. What answers a resumed migration without a secret may be
        another destination, and its failure says nothing about the guest."""
        path = self.link.return_path
        return path is not None and path.refused and self._is_same_destination

    @property
    def started_there(self) -> bool:
        """Whether the destination has read the device state of a postcopy, with RUN at its end."""
        path = self.link.return_path
        return self._started_there or (path is not None and path.has(ReturnMessage.PONG, PACKAGE_PING))

    def note_started_there(self) -> None:
        """The destination has answered something that only one that runs the guest answers."""
        self._started_there = True

    # -- postcopy ----------------------------------------------------------------------------------------------------

    def later(self) -> list[PostcopySaver]:
        """The savers of what may follow once the guest runs on the destination."""
        return [saver for saver in self.live if isinstance(saver, PostcopySaver) and saver.follows_later()]

    def on_demand(self) -> list[OnDemandSaver]:
        """Those of them whose rest the guest may wait for."""
        return [saver for saver in self.later() if isinstance(saver, OnDemandSaver)]

    def serve_requests(self) -> None:
        """From now on the destination may ask for pages."""
        self.requests = PageRequests(self.on_demand(), self.meter, self.requested)
        for message in (ReturnMessage.REQ_PAGES, ReturnMessage.REQ_PAGES_ID):
            self.link.answers.handle(message, self.requests)

    # -- postcopy that pauses --------------------------------------------------------------------------------------

    def expect_resume(self) -> None:
        """The migration is about to pause: from now on resume() may come, once."""
        with self._resuming:
            self._next_transport = None

    def await_transport(self) -> None:
        """Wait for resume(), or until it is time to dial again by itself. Raises Interrupted."""
        began = time.monotonic()
        while True:
            self._resumed.clear()
            self.interrupt.check()
            delay = self.reconnection.delay()
            rest = None if delay is None else began + delay - time.monotonic()
            with self._resuming:
                if self._next_transport is None and rest is not None and rest <= 0:
                    self.reconnection.begin()
                    self._next_transport = self.transport
                if self._next_transport is not None:
                    return
            self._resumed.wait(rest)

    def replace_link(self) -> None:
        """Have a new one over the transport that was waited for. What the destination has said over the old one stays
        known."""
        assert self._next_transport is not None, "called before await_transport()"
        self.transport = self._next_transport
        self._started_there = self.started_there
        self._is_same_destination = self.secret is not None  # it has to show that before anything else is read
        self.link = Link(self.transport, self.interrupt, self.meter, self.settings)

    def resume(self, transport: Transport) -> None:
        """Go on over this transport. From any thread, one at a time. Raises StateError if that was said already since
        the migration paused."""
        with self._resuming:
            if self._next_transport is not None:
                raise StateError("A migration is being resumed already")
            self._next_transport = transport
            self.reconnection.count_anew()
        self._resumed.set()

    def settings_changed(self) -> None:
        """Let waits that depend on a parameter look at it again. From any thread."""
        self.meter.wake()
        self._resumed.set()

    # -- how it is interrupted, from any thread --------------------------------------------------------------------

    def cancel(self) -> None:
        """End the migration. If the destination may be running the guest already, it has a moment to confirm that."""
        with self.custody.deciding:
            self.interrupt.set()
            handed_over = self.custody.handed_over
        if not handed_over:
            self.abort()
            return
        last_words = threading.Timer(LAST_WORDS, self.abort)
        last_words.daemon = True
        last_words.start()

    def abort(self) -> None:
        """Wake the migration thread wherever it waits, to end the migration."""
        self.interrupt.set()
        self.proceed.set()
        self._resumed.set()
        self.link.abort()
        self.meter.wake()

    def return_path_failed(self) -> None:
        """Wake the migration thread wherever it waits; it finds the reason in the return path. A destination that has
        reported a failure reads on, so it need not be cut off at once."""
        if self.link.answers.refused:
            late = threading.Timer(LAST_WORDS, self.link.abort)
            late.daemon = True
            late.start()
        else:
            self.link.abort()
        self.proceed.set()
        self.meter.wake()

    # -- for the savers --------------------------------------------------------------------------------------------

    def open_channel(self) -> Channel:
        """One more channel to the destination, from any thread. Raises ChannelError if the transport has only one."""
        return self.link.open_channel()

    def send_command(self, number: int, payload: bytes) -> None:
        """A command in front of the next section."""
        self.sections.command(number, payload)

    def throttle_guest(self, percent: int) -> None:
        """Slow the guest down by `percent` (0 to 99) of its time. Raises MachineError if the machine cannot."""
        if not isinstance(self.machine, ThrottlableMachine):
            raise MachineError(f"a machine of kind '{self.machine.kind}' cannot be throttled")
        self.custody.throttle(self.machine, percent, self.check)


def needs_return_path(settings: Settings, features: TransportFeatures) -> bool:
    """Whether a migration with these settings has a return path. With dirty-bitmaps alone it has one if the transport
    does, since it may switch to postcopy then."""
    if settings.capability("dirty-bitmaps") and features.return_path:
        return True
    return settings.capability("return-path") or settings.capability("postcopy-ram")
