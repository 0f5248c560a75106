"""A metered channel keeps the contract of channels, also if a limit splits its sends."""

from __future__ import annotations

import pytest
from corefw_transport_tcp import TcpTransport

from corefw.channel import Channel, Interrupt
from corefw.engine.meter import Meter, metered
from corefw.settings import Settings
from corefw.testing.transport import TransportCase, applicable, check_transport


def with_limit(limit: int) -> type[TcpTransport]:
    """tcp: with channels whose source has this max-bandwidth."""

    class MeteredTransport(TcpTransport):
        def connect(self, interrupt: Interrupt) -> Channel:
            settings = Settings()
            settings.set_parameters({"max-bandwidth": limit})
            return metered(super().connect(interrupt), Meter(settings))

    return MeteredTransport


def case(limit: int) -> TransportCase:
    return TransportCase(transport=with_limit(limit), listen=lambda: "tcp:127.0.0.1:0")


LIMITS: dict[str, int] = {"no limit": 0, "1 GiB/s": 1 << 30}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("check", applicable(case(0)))
def test_contract(check: str, limit: str) -> None:
    assert check_transport(case(LIMITS[limit]), only=[check]) == [check]
