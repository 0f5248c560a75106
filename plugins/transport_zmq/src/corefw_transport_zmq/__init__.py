"""The transport zmq: byte streams over ZeroMQ, across TCP or a UNIX socket, encrypted if keys are given.

    zmq:tcp://HOST:PORT[?OPTIONS]     zmq:ipc://PATH[?OPTIONS]

ZeroMQ hides lost connections, drops messages that do not fit, and reconnects by itself. This plugin hides that: a
stream is complete and in order or raises, a slow receiver blocks the sender, and only the peer itself can end a stream.

    address    parses the URI               keys       CURVE certificates, authorized peers
    protocol   the messages                 link       state of one stream, independent of ZeroMQ
    hub        the thread that owns a socket and moves messages between it and its links
    dialling   the hub of an outgoing stream           serving    the hub of a listener
    channel    a link as a Channel          transport  connect() and listen()

docs/zmq.md is the page for users and describes the protocol.
"""

from __future__ import annotations

from corefw_transport_zmq.transport import ZmqTransport

__all__ = ["ZmqTransport"]
