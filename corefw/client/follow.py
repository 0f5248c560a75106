"""Follow a migration until it is over: poll it, show it, and act when the user or a relay wants it to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from corefw.client.progress import Progress, switched
from corefw.closing import Closing
from corefw.errors import ChannelError, MigfwError, UsageError, one_line
from corefw.qmp.engines import POLL, EngineClient
from corefw.quantities import format_milliseconds
from corefw.states import POSTCOPY, MigrationStatus

OVER: Final = frozenset(
    {
        MigrationStatus.NONE,
        MigrationStatus.COMPLETED,
        MigrationStatus.FAILED,
        MigrationStatus.CANCELLED,
        MigrationStatus.POSTCOPY_PAUSED,
        MigrationStatus.COLO,
    }
)
"""Statuses in which nothing more happens by itself."""

SWITCHES: Final[Mapping[str, int]] = {"now": 0, "after-first-pass": 2}
"""When this process can have a real QEMU switch to postcopy: the passes (dirty-sync-count) of which that takes note.
With the second everything has been sent once."""


SILENCE: Final = 10.0
"""Seconds without any progress after which the user gets a hint."""

_TAKES: Final = frozenset({MigrationStatus.SETUP, MigrationStatus.ACTIVE, MigrationStatus.DEVICE})
"""Statuses in which the destination should answer, or take something."""


_CONNECTED: Final = frozenset({MigrationStatus.POSTCOPY_ACTIVE, MigrationStatus.COMPLETED})
"""Statuses of a postcopy that is not broken; the first may be over before it is seen."""


def _next_attempt(reconnect: Mapping[str, Any]) -> str:
    """A phrase: "in 400 ms (attempt 2 of 5)"."""
    limit = f" of {reconnect['limit']}" if "limit" in reconnect else ""
    return f"in {format_milliseconds(reconnect.get('wait', 0))} (attempt {reconnect['attempts'] + 1}{limit})"


def _goes_on(answer: Mapping[str, Any]) -> bool:
    """Whether a migration that is paused goes on by itself."""
    return "reconnect" in answer.get("x-migfw", {})


class Display(Closing):
    """A display that shows nothing, and the base of the others. A context manager, so that the terminal is restored."""

    def update(self, progress: Progress) -> None:
        """Show the latest answer."""

    def say(self, text: str) -> None:
        """Print one line that stays above the progress."""

    def close(self) -> None:
        """Stop. Idempotent."""


class Follower:
    """Watches one migration of an engine until it is over, and shows it on a display.

    It may act, once each: cancel the migration after Ctrl-C or if `has_failed` returns True (a relay that broke), have
    a QEMU switch to postcopy when `switch` says so (a migfw does that by itself), and explain pre-switchover.
    """

    def __init__(
        self,
        engine: EngineClient,
        display: Display,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        switch: str | None = None,
        has_failed: Callable[[], bool] | None = None,
        silence: float = SILENCE,
    ) -> None:
        """`silence`: see SILENCE."""
        self._engine = engine
        self._silence = silence
        self._display = display
        self._interrupted = interrupted
        self._switch_at = None if switch is None else SWITCHES[switch]
        self._has_failed = has_failed
        self._cancelling = False
        self._explained = False
        self._switched = False
        self._broken = False
        self._attempts = 0
        self._moved: tuple[str, int] = ("", 0)
        self._since = time.monotonic()
        self._hinted = False

    def wait(self) -> dict[str, Any]:
        """Wait until the migration is over; the last answer of query-migrate. Raises MigfwError if the engine ends."""
        while True:
            try:
                answer = self._engine.query_migrate()
            except ChannelError as error:
                raise MigfwError(
                    f"the engine ended while its guest migrated ({error}): check the destination"
                ) from None
            progress = Progress.of(answer)
            self._tell_connection(answer)
            if progress.phase in OVER and not _goes_on(answer):
                return answer
            self._display.update(progress)
            self._hint(progress)
            if not self._switched and (text := switched(answer)):
                self._switched = True
                self._display.say(f"switched to postcopy {text}")
            self._act(progress)
            time.sleep(POLL)

    def _tell_connection(self, answer: Mapping[str, Any]) -> None:
        """Say when the connection of a postcopy breaks and is there again."""
        reconnect = answer.get("x-migfw", {}).get("reconnect", {})
        broken = bool(reconnect)
        why = one_line(str(answer.get("error-desc", "no reason is known")))
        attempts, waits = reconnect.get("attempts", 0), answer.get("status") == MigrationStatus.POSTCOPY_PAUSED
        if broken and waits and not self._broken:
            self._attempts = attempts
            self._display.say(f"the connection broke: {why}; dialling again {_next_attempt(reconnect)}")
        elif broken and waits and attempts != self._attempts:
            self._attempts = attempts
            self._display.say(f"attempt {attempts} failed: {why}; next one {_next_attempt(reconnect)}")
        elif self._broken and answer.get("status") in _CONNECTED:
            self._display.say("connected again")
        said = self._broken or waits
        self._broken = (broken and said) or (self._broken and answer.get("status") not in _CONNECTED)

    def _hint(self, progress: Progress) -> None:
        """Say, once, that the destination takes nothing: off a terminal nothing else would appear."""
        moved = (progress.phase, progress.transferred)
        now = time.monotonic()
        if moved != self._moved:
            self._moved, self._since = moved, now
        elif not self._hinted and now - self._since > self._silence and progress.phase in _TAKES:
            self._hinted = True
            self._display.say(
                f"nothing was sent for {self._silence:g} s (status '{progress.phase}'): the destination does not answer"
                " or does not read; a QEMU with the capability postcopy-preempt waits for --cap postcopy-preempt here"
            )

    def _act(self, progress: Progress) -> None:
        failed = self._has_failed is not None and self._has_failed()
        if not self._cancelling and (self._interrupted() or failed):
            self._cancelling = True
            self._cancel(progress)
        elif self._switch_at is not None and progress.passes >= self._switch_at:
            self._switch_at = None
            with suppress(UsageError):  # it has begun to switch over by itself
                self._engine.call("migrate-start-postcopy")
                self._display.say(f"asked QEMU to switch to postcopy in pass {progress.passes}")
        if progress.phase == MigrationStatus.PRE_SWITCHOVER and not self._explained:
            self._explained = True
            self._display.say("the guest is stopped before the switchover: 'migfw continue' or 'migfw cancel'")

    def _cancel(self, progress: Progress) -> None:
        if progress.phase in POSTCOPY:
            self._display.say("too late to cancel: the guest runs on the destination; press Ctrl-C again to exit")
            return
        if self._interrupted():
            self._display.say("cancelling; press Ctrl-C again to exit at once")
        try:
            self._engine.call("migrate_cancel")
        except UsageError:
            self._cancelling = False  # it has switched to postcopy meanwhile: the next poll finds that
