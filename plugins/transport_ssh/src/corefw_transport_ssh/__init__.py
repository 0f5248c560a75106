"""The transport ssh: a tunnel through an sshd to a listener behind it or, when listening, a port on the remote host.

    ssh://[USER@]HOST[:PORT]/tcp:HOST:PORT      dial: the remote sshd connects to HOST:PORT for us
                                                listen: the remote sshd listens at HOST:PORT for us
    ssh://[USER@]HOST[:PORT]/unix:PATH          dial only: a UNIX socket on the remote host

Invariant: host keys are always checked, nothing asks for a password, and a lost ssh connection never looks like an end.

    address      parses the URI                 config      reads ~/.ssh/config
    known_hosts  checks host keys               credentials our keys, from files and the agent
    connection   paramiko with fixes and limits dial        connects and logs in
    channel      one tunnel as a Channel        remote      commands on the remote host
    transport    connect(), listen(), log_in()

docs/ssh.md is the page for users.
"""

from __future__ import annotations

from corefw_transport_ssh.transport import SshTransport

__all__ = ["SshTransport"]
