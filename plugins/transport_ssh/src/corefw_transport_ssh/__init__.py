"""The transport ssh: a tunnel through an sshd to a listener behind it, or, waiting, a port at a far host.

    ssh://[USER@]HOST[:PORT]/tcp:HOST:PORT      dial: the remote sshd connects to HOST:PORT for us
                                                wait: the remote sshd listens at HOST:PORT for us
    ssh://[USER@]HOST[:PORT]/unix:PATH          dial only: a UNIX socket on the far host

Invariant: host keys are checked always, nothing asks for a password, and a lost ssh connection never looks like an end.

    address      what the URI says              config      what ~/.ssh/config adds to it
    known_hosts  whether we know the host       credentials our keys and the agent's
    connection   paramiko, mended and bounded   dial        from a destination to a connection
    channel      one tunnel as a Channel        remote      commands on the far host
    transport    connect(), listen(), log_in()

docs/ssh.md is the user's page.
"""

from __future__ import annotations

from corefw_transport_ssh.transport import SshTransport

__all__ = ["SshTransport"]
