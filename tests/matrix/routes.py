"""The route between the two sides of a case, with a proxy that they are unaware of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.helpers.cutting import CutProxy
from tests.helpers.sshd import Sshd


class Route(ABC):
    """One transport.

    listen        for --incoming
    listen_again  for migrate-recover
    environment   of the source's process
    """

    listen = "tcp:127.0.0.1:0"
    listen_again = "tcp:127.0.0.1:0"

    def __init__(self, folder: Path, sshd: Sshd | None) -> None:
        self.folder: Final = folder
        self.sshd: Final = sshd
        self.environment: Mapping[str, str] = {}

    @abstractmethod
    def target(self, uri: str) -> str:
        """The proxy's target, for a destination that listens at `uri`."""

    @abstractmethod
    def through(self, proxy: CutProxy, uri: str) -> str:
        """The URI that a source dials to reach `uri` through the proxy."""


class Tcp(Route):
    def target(self, uri: str) -> str:
        return uri

    def through(self, proxy: CutProxy, uri: str) -> str:
        return proxy.uri


class Unix(Tcp):
    def __init__(self, folder: Path, sshd: Sshd | None) -> None:
        super().__init__(folder, sshd)
        self.listen = f"unix:{folder / 'to'}"
        self.listen_again = f"unix:{folder / 'again'}"


class Zmq(Route):
    listen = listen_again = "zmq:tcp://127.0.0.1:*"

    def target(self, uri: str) -> str:
        return f"tcp:{uri.rpartition('/')[2]}"

    def through(self, proxy: CutProxy, uri: str) -> str:
        return f"zmq:tcp://{proxy.uri.removeprefix('tcp:')}"


class Ssh(Route):
    """The proxy is in front of the sshd."""

    def target(self, uri: str) -> str:
        assert self.sshd is not None
        return f"tcp:127.0.0.1:{self.sshd.port}"

    def through(self, proxy: CutProxy, uri: str) -> str:
        assert self.sshd is not None
        address = proxy.uri.removeprefix("tcp:")
        home = self.folder / "home"
        if not home.exists():
            self.sshd.make_home(home)
            self.environment = {"HOME": str(home), "SSH_AUTH_SOCK": ""}
        host, _, port = address.partition(":")
        with (home / ".ssh" / "known_hosts").open("a") as known:
            known.write(self.sshd.known_hosts_line(f"[{host}]:{port}"))
        return f"ssh://{self.sshd.user}@{address}/{uri}"


ROUTES: Final[Mapping[str, type[Route]]] = {"tcp": Tcp, "unix": Unix, "zmq": Zmq, "ssh": Ssh}
