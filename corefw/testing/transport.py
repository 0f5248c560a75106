"""The contract kit for transports: checks that a transport keeps the contract of corefw.channel.

    from corefw.testing.transport import TransportCase, applicable, check_transport

    CASE = TransportCase(transport=TcpTransport, listen=lambda: "tcp:127.0.0.1:0", wrong=("tcp:nohost",))

    @pytest.mark.parametrize("check", applicable(CASE))
    def test_contract(check):
        check_transport(CASE, only=[check])

Each check states one promise of the interface, uses both ends for real, and fails with an AssertionError that says in
one line what was promised and what happened. No descriptor, process or thread may be left behind. It needs no test
framework.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TypeVar

from corefw.channel import TransportFeatures
from corefw.testing import transport_breaks, transport_streams
from corefw.testing.checks import CHECKS, has
from corefw.testing.ends import TransportCase, Workbench
from corefw.testing.kit import CHECK_DEADLINE, chosen, naming
from corefw.testing.tasks import Possessions, Task

__all__ = ["CHECKS", "TransportCase", "applicable", "check_transport"]

assert transport_streams and transport_breaks, "imported, they have entered their checks in CHECKS"

_T = TypeVar("_T")


def applicable(case: TransportCase) -> list[str]:
    """The names of the checks that apply to this transport, in the order in which they run.

    No transport is made: `case.features`, or the features of the transport's class, say what it can do.
    """
    features = case.features or getattr(case.transport, "features", None)
    assert isinstance(features, TransportFeatures), (
        f"{case.transport} does not say what it can do before it is made: give the case its `features`"
    )
    return [name for name, (_, need) in CHECKS.items() if need in has(case, features)]


def check_transport(case: TransportCase, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check that applies to this transport (or `only` these); returns their names.

    Raises AssertionError for the first broken promise. What the transport's features exclude is not checked.
    """
    names = chosen(CHECKS, only)
    features = _run(case, "the first pair of channels", _first_pair, None)
    assert case.features in (None, features), f"the transport says {features}, the case {case.features}"
    done = [name for name in names if CHECKS[name][1] in has(case, features)]
    for name in done:
        _run(case, name, CHECKS[name][0], Possessions.now())
    return done


def _run(case: TransportCase, name: str, check: Callable[[Workbench], _T], before: Possessions | None) -> _T:
    """Run one check in its own thread, on its own bench."""
    bench = Workbench(case)
    try:
        with naming(name):
            found = Task("the check", check, bench).result(CHECK_DEADLINE)
            bench.close()
            if before:
                before.assert_no_more()
        return found
    finally:
        bench.close()


def _first_pair(bench: Workbench) -> TransportFeatures:
    """The transport's features. Connecting once also creates what libraries create once per process."""
    if bench.case.stored:
        bench.stored(lambda channel: channel.send(b"x"))
        return bench.outgoing(bench.case.listen()).features
    listener = bench.listener()
    features = bench.dial(listener).features
    bench.pair(listener)
    return features
