"""The guest of a postcopy on the destination: it runs while its RAM is still arriving.

The guest is started in a thread of its own, because it may wait for pages before it runs, and the incoming thread has
to bring them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial

from corefw.engine.pagefaults import PageFaults
from corefw.engine.standby import StandbyThread
from corefw.errors import ANYTHING, ChannelError, MigfwError
from corefw.machine import Machine, PostcopyMachine
from corefw.section import SectionKey
from corefw.wire.records import SectionHeader

log = logging.getLogger(__name__)


def obstacle_to_postcopy(machine: Machine) -> str | None:
    """Why a guest cannot arrive in this machine in postcopy, and what to do; None if it can."""
    if not isinstance(machine, PostcopyMachine):
        return (
            f"a machine of kind '{machine.kind}' cannot run while its RAM is still arriving"
            " (switch capability 'postcopy-ram' off on the source)"
        )
    if (reason := machine.postcopy_unsupported()) is not None:
        return f"{reason} (or switch capability 'postcopy-ram' off on the source)"
    return None


class GuestArrival:
    """From LISTEN on.

    faults     serves the guest's page faults
    sections   the live sections of which the rest is still to come: what their START said
    is_whole   nothing that the guest may wait for is still to come
    """

    def __init__(
        self,
        faults: PageFaults,
        sections: Mapping[SectionKey, SectionHeader],
        thread: StandbyThread,
        *,
        is_whole: bool = False,
    ) -> None:
        """`thread` starts the guest."""
        self.faults = faults
        self.sections = sections
        self.is_whole = is_whole
        self._thread = thread
        self._error: MigfwError | None = None
        self._lock = threading.Lock()  # guards the two below
        self._started = False
        self._waiting: list[Callable[[], None]] = []

    def start(self, start: Callable[[], None], on_failure: Callable[[], None]) -> None:
        """Call `start` in a thread, which raises if the guest does not run; then `on_failure`. Only once: nothing
        happens when a connection broke and this phase is entered again."""
        if not self._thread.began:
            self._thread.begin(partial(self._run, start, on_failure))

    def _run(self, start: Callable[[], None], on_failure: Callable[[], None]) -> None:
        try:
            start()
        except MigfwError as error:
            self._error = error
        except ANYTHING as bug:
            log.exception("the guest could not be started")
            self._error = MigfwError(f"internal error: {type(bug).__name__}: {bug}")
        if self._error is not None:
            on_failure()
            return
        with self._lock:
            self._started = True
            waiting, self._waiting = self._waiting, []
        for call in waiting:
            _try(call)

    def when_started(self, call: Callable[[], None]) -> None:
        """Call this at once if the guest has started or is not about to, else when it has, in the thread that starts
        it. What it raises is raised only if it is called at once."""
        with self._lock:
            if self._thread.began and not self._started:
                self._waiting.append(call)
                return
        call()

    @property
    def may_run(self) -> bool:
        """Whether the guest may have run here: then the source never hears that it did not."""
        return self._thread.began and self._error is None

    def check(self) -> None:
        """Raise why the guest could not be started, if that is so."""
        if self._error is not None:
            raise self._error

    def complete(self) -> None:
        """Everything has arrived. Raises why the guest could not be started."""
        self.faults.release()
        if self._thread.began:
            self._thread.join()
        self.check()

    def close(self) -> None:
        """Serve it no more. A guest that may have run must not see what has not arrived, until it is terminated."""
        if self.may_run:
            self.faults.close()
        else:
            self.faults.release()


def _try(call: Callable[[], None]) -> None:
    try:
        call()
    except ChannelError as error:
        log.debug("the source was not answered: %s", error)
    except ANYTHING:
        log.exception("something that waited for the guest's start failed")
