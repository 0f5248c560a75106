"""The transports exec:, fd: and file:: streams through file descriptors.

exec:COMMAND   a shell command: it reads the outgoing stream from its standard input, and writes an incoming one to
               its standard output
fd:N, fd:NAME  a descriptor that this process has inherited, or was given under a name (QMP getfd)
file:PATH      a file to write, or to read as an incoming stream; devices and FIFOs as well
"""

from corefw_transport_exec.command import ExecTransport
from corefw_transport_exec.descriptor import FdTransport
from corefw_transport_exec.file import FileTransport

__all__ = ["ExecTransport", "FdTransport", "FileTransport"]
