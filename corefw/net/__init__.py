"""Plumbing below the transports: sockets, dialing and listening, iovecs, descriptors, sets of channels, relays."""

import os
from typing import Final

IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
"""Maximum pieces of memory in one system call: 1024 on every Linux."""
