"""file: a path has the complete stream, or still what it had before."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from corefw_transport_exec import FileTransport

from corefw.channel import Channel, FileBacked, Interrupt, TransportContext
from corefw.errors import ChannelError, Interrupted, UriError
from corefw.testing.tasks import Task
from corefw.uri import MigrationUri

NEVER = Interrupt()
"""An interrupt that is never set."""

NOBODY = 65534
"""The user with no special permissions. (Root passes all permission checks.)"""


def outgoing(path: Path | str) -> Channel:
    return FileTransport(MigrationUri("file", str(path)), TransportContext()).connect(NEVER)


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def receive_all(path: Path) -> bytes:
    room, got = memoryview(bytearray(65536)), b""
    with (
        FileTransport(MigrationUri("file", str(path)), TransportContext()).listen() as listener,
        listener.accept(NEVER) as channel,
    ):
        while count := channel.receive_into(room):
            got += room[:count]
    return got


def test_the_name_comes_with_the_end(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    with outgoing(path) as channel:
        channel.send(b"all of it")
        assert not path.exists()
        channel.send_eof()
        assert path.read_bytes() == b"all of it"
    assert names(tmp_path) == ["guest"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert receive_all(path) == b"all of it"


@pytest.mark.parametrize("how", ["close", "abort", "error"])
def test_a_failed_save_keeps_the_old_file(tmp_path: Path, how: str) -> None:
    path = tmp_path / "guest"
    path.write_bytes(b"the old one")
    with contextlib.suppress(ZeroDivisionError), outgoing(path) as channel:
        channel.send(b"half of it")
        if how == "abort":
            channel.abort()
            with pytest.raises(Interrupted):
                channel.send_eof()
        if how == "error":
            raise ZeroDivisionError
    assert path.read_bytes() == b"the old one"
    assert names(tmp_path) == ["guest"]


def test_only_what_appears_whole_is_atomic(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for path, atomic in ((tmp_path / "new", True), (Path("/dev/null"), False), (fifo, False)):
        transport = FileTransport(MigrationUri.parse(f"file:{path}"), TransportContext())
        transport.connect(NEVER).close()
        assert transport.features.atomic is atomic, path
    os.close(reader)


def test_a_file_of_ours_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    path.write_bytes(b"old")
    path.chmod(0o640)
    with outgoing(path) as channel:
        channel.send(b"new")
        channel.send_eof()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("target", ["real", "nothing"])
def test_a_link_is_replaced_and_not_followed(tmp_path: Path, target: str) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o666)
    link.symlink_to(target)
    with outgoing(link) as channel:
        channel.send(b"new")
        channel.send_eof()
    assert not link.is_symlink()
    assert (link.read_bytes(), link.stat().st_mode & 0o777) == (b"new", 0o600)
    assert real.read_bytes() == b"old"
    assert names(tmp_path) == ["link", "real"]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of another user")


@needs_root
def test_a_file_of_another_user_does_not_keep_mode_or_owner(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    path.write_bytes(b"old")
    path.chmod(0o666)
    os.chown(path, NOBODY, NOBODY)
    with outgoing(path) as channel:
        channel.send(b"new")
        channel.send_eof()
    found = path.stat()
    assert (found.st_uid, found.st_mode & 0o777) == (os.geteuid(), 0o600)


@needs_root
@pytest.mark.parametrize("through", ["itself", "a link"])
def test_a_fifo_of_another_user_gets_no_memory(tmp_path: Path, through: str) -> None:
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    os.chown(fifo if through == "itself" else link, NOBODY, NOBODY, follow_symlinks=False)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ChannelError, match=f"that user {NOBODY} made"):
        outgoing(fifo if through == "itself" else link)
    os.close(reader)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("missing", "no such file"), ("folder", "is a directory"), ("file/below", "not a directory")],
)
def test_what_cannot_be_read_is_told_before_anything_waits(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ChannelError, match=f"file:{tmp_path}/{name}: {expected}"):
        FileTransport(MigrationUri("file", f"{tmp_path}/{name}"), TransportContext()).listen()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("none/below", "no such file"), ("folder", "is a directory"), ("file/below", "not a directory")],
)
def test_what_cannot_be_written_is_told_at_once(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ChannelError, match=f"file:{tmp_path}/{name}: {expected}"):
        outgoing(tmp_path / name)


def test_no_permission(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import os, sys
        from corefw_transport_exec import FileTransport
        from corefw.channel import Interrupt, TransportContext
        from corefw.errors import ChannelError
        from corefw.uri import MigrationUri

        transport = FileTransport(MigrationUri("file", "x"), TransportContext())
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(*[int(sys.argv[1])] * 3)
            os.setresuid(*[int(sys.argv[1])] * 3)
        try:
            transport.connect(Interrupt())
        except ChannelError as error:
            print(error)
    """)
    tmp_path.chmod(0o500)
    command = [sys.executable, "-c", script, str(NOBODY)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("file:x: permission denied\n", "")
    assert not names(tmp_path)


def test_a_full_device() -> None:
    with outgoing("/dev/full") as channel, pytest.raises(ChannelError, match="file:/dev/full: no space left on device"):
        channel.send(b"x")


def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path) -> None:
    """On a real file system of 1 MiB, in a mount namespace of its own."""
    script = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from corefw_transport_exec import FileTransport
        from corefw.channel import Interrupt, TransportContext
        from corefw.errors import ChannelError
        from corefw.uri import MigrationUri

        path = Path(sys.argv[1], "guest")
        path.write_bytes(b"the old one")
        with FileTransport(MigrationUri("file", str(path)), TransportContext()).connect(Interrupt()) as channel:
            try:
                channel.send(bytes(4 << 20))
                channel.send_eof()
            except ChannelError as error:
                print(error)
        print(path.read_bytes().decode(), os.listdir(sys.argv[1]))
    """)
    mount = 'mount -t tmpfs -o size=1m none "$1" || exit 77; exec "$2" -c "$3" "$1"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "-", str(tmp_path), sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot make a mount namespace: {done.stderr.strip()}")
    expected = f"file:{tmp_path}/guest: no space left on device\nthe old one ['guest']\n"
    assert (done.stdout, done.stderr) == (expected, "")


def test_devices_and_standard_output() -> None:
    with outgoing("/dev/null") as channel:
        channel.send(b"x")
        channel.send_eof()
    script = (
        "from corefw_transport_exec import FileTransport; from corefw.channel import Interrupt, TransportContext\n"
        "from corefw.uri import MigrationUri\n"
        "with FileTransport(MigrationUri('file', '/dev/stdout'), TransportContext()).connect(Interrupt()) as channel:\n"
        "    channel.send(b'the stream'); channel.send_eof()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert done.stdout == b"the stream"


def test_standard_output_that_is_a_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out"
    script = (
        "from corefw_transport_exec import FileTransport; from corefw.channel import Interrupt, TransportContext\n"
        "from corefw.uri import MigrationUri\n"
        "with FileTransport(MigrationUri('file', '/dev/fd/1'), TransportContext()).connect(Interrupt()) as channel:\n"
        "    channel.send(b'the stream'); channel.send_eof()\n"
    )
    with path.open("wb") as file:
        inode = path.stat().st_ino
        subprocess.run([sys.executable, "-c", script], stdout=file, check=True)
    assert (path.read_bytes(), path.stat().st_ino) == (b"the stream", inode)


def test_a_fifo_joins_two(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def send() -> None:
        with outgoing(fifo) as channel:
            channel.send(b"through a fifo")
            channel.send_eof()

    sending = Task("send", send)
    sending.let_block()
    assert receive_all(fifo) == b"through a fifo"
    sending.result()


def test_waiting_for_a_fifo_can_be_interrupted(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    transport = FileTransport(MigrationUri("file", str(fifo)), TransportContext())
    with transport.listen() as listener:
        interrupted(listener.accept)
    interrupted(transport.connect)


def interrupted(wait: Callable[[Interrupt], Channel]) -> None:
    interrupt = Interrupt()
    waiting = Task("wait", wait, interrupt)
    waiting.let_block()
    interrupt.set()
    assert isinstance(waiting.error(), Interrupted)
    interrupt.close()


# -- offsets, and files of libvirt -------------------------------------------------------------------------------------


def test_an_offset_keeps_what_is_before_it(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    path.write_bytes(b"header, and an old stream that is longer than the new one")
    with outgoing(f"{path},offset=8") as channel:
        channel.send(b"a stream")
        assert path.read_bytes().startswith(b"header, and an old stream"), "not before it is whole"
        channel.send_eof()
    assert path.read_bytes() == b"header, a stream"
    assert receive_all(Path(f"{path},offset=8")) == b"a stream"
    assert names(tmp_path) == ["guest"]


@pytest.mark.parametrize("before", [None, b"", b"abc"])
def test_an_offset_behind_the_end_leaves_zeros(tmp_path: Path, before: bytes | None) -> None:
    path = tmp_path / "guest"
    if before is not None:
        path.write_bytes(before)
    with outgoing(f"{path},offset=5") as channel:
        channel.send(b"a stream")
        channel.send_eof()
    assert path.read_bytes() == (before or b"").ljust(5, b"\0") + b"a stream"


def test_an_offset_and_a_link(tmp_path: Path) -> None:
    """With an offset, a new file would lack the other contents of the link's target."""
    (tmp_path / "other").write_bytes(b"header")
    (tmp_path / "guest").symlink_to("other")
    with pytest.raises(ChannelError, match="too many levels of symbolic links"):
        outgoing(f"{tmp_path}/guest,offset=3")
    assert names(tmp_path) == ["guest", "other"]


def test_an_offset_that_is_none(tmp_path: Path) -> None:
    for number, why in [("x", "expected bytes"), (str(1 << 64), "no file is longer")]:
        with pytest.raises(UriError, match=f"'{number}' is not an offset: {why}"):
            FileTransport(MigrationUri("file", f"{tmp_path}/guest,offset={number}"), TransportContext())
    os.mkfifo(tmp_path / "fifo")
    transport = FileTransport(MigrationUri("file", f"{tmp_path}/fifo,offset=3"), TransportContext())
    for use in (lambda: transport.connect(NEVER), transport.listen):
        with pytest.raises(ChannelError, match="an offset needs a regular file"):
            use()


def test_a_save_image_that_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"LibvirtQemudPart" + bytes(100))
    with pytest.raises(ChannelError, match=f"file:{path} is an incomplete libvirt save image"):
        FileTransport(MigrationUri("file", str(path)), TransportContext()).listen()


def test_passing_over_a_part_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "guest"
    path.write_bytes(b"0123456789" * 20)
    with (
        FileTransport(MigrationUri("file", f"{path},offset=10"), TransportContext()).listen() as listener,
        listener.accept(NEVER) as channel,
    ):
        assert isinstance(channel, FileBacked)
        assert channel.origin == 10
        channel.skip(95)
        room = memoryview(bytearray(3))
        assert channel.receive_into(room) == 3
        assert bytes(room) == b"567"
        channel.abort()
        with pytest.raises(Interrupted):
            channel.skip(1)


def test_closing_the_listener_of_a_fifo_ends_accept(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    transport = FileTransport(MigrationUri("file", f"{tmp_path}/fifo"), TransportContext())
    listener = transport.listen()
    blocked = Task("accept", listener.accept, NEVER)
    blocked.let_block()
    listener.close()
    with pytest.raises(ChannelError, match="no longer listening"):
        blocked.result()
    with pytest.raises(ChannelError, match="no longer listening"):
        listener.accept(NEVER)
