"""QEMU's control protocol: our server for it, and a client for our server and for a real QEMU.

    address.py      where an engine listens: unix:PATH, tcp:HOST:PORT, or a name
    json_stream.py  bytes in pieces of any size -> JSON messages; hostile input
    protocol.py     what the values mean: requests, replies, events, the greeting
    schema.py       a function's signature -> what its arguments have to be
    commands/       the table of commands, and the functions behind it
    session.py      one client's conversation: negotiation, dispatch; no I/O
    connection.py   one client's socket, threads and queues
    server.py       listening, all clients, the engine's events
    client.py       the other end

The client's side (address, json_stream, protocol, client) imports neither NumPy nor the engine.
"""
