"""The transport zmq: byte streams over ZeroMQ, across TCP or a UNIX socket, encrypted where keys are given.

    zmq:tcp://HOST:PORT[?OPTIONS]     zmq:ipc://PATH[?OPTIONS]

The law: ZeroMQ hides lost connections, drops what does not fit and reconnects as it likes; on this side of the plugin
nothing of that shows. A stream is whole and in order or raises, a slow receiver blocks the sender, and an end is an end
only when the peer said so.

    address    what the URI says            keys       CURVE certificates, who may come in
    protocol   the messages                 link       one stream's state; knows nothing of ZeroMQ
    hub        the thread that owns a socket, and moves messages between it and its links
    dialling   the hub of a stream that we dial        serving    the hub of a listener
    channel    a link as a Channel          transport  connect() and listen()

docs/zmq.md is the user's page, and describes the protocol.
"""

from __future__ import annotations

from corefw_transport_zmq.transport import ZmqTransport

__all__ = ["ZmqTransport"]
