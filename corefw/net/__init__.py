"""Plumbing below the transports: sockets, dialing and listening, iovecs, descriptors, sets of channels, relays."""
