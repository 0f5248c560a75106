"""Moving a guest from the outside: what a client of an engine, or of a real QEMU, does around a migration.

changes.py       settings as a user writes them, and changes to an engine's settings
routes.py        how the bytes reach a URI; a relay for a real QEMU that does not support its transport
destination.py   a destination that is started on another host over ssh
progress.py      what the answers of query-migrate mean, as phrases
follow.py        poll a migration until it is over
"""
