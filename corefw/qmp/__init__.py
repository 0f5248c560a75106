"""QEMU's control protocol: our server for it, and a client for our server and for a real QEMU.

    address.py      where an engine listens: unix:PATH, tcp:HOST:PORT, or a name
    json_stream.py  turns bytes, in pieces of any size, into JSON messages; takes hostile input
    protocol.py     requests, replies, events and the greeting
    schema.py       checks arguments against a function's signature
    commands/       the table of commands, and the functions behind it
    documents.py    the types of answers and events; answers.py makes them from the engine's reports
    session.py      one client's conversation: negotiation, dispatch; no I/O
    connection.py   one client's socket, threads and queues
    server.py       listens, and serves all clients
    client.py       the client
    engines.py      find an engine of this user and talk to it; claim the name of a new one

The client's side (address, json_stream, protocol, client, engines) imports neither NumPy nor the engine.
"""
