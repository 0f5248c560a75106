"""Commands about the conversation and the process: capabilities, version, names, file descriptors, quit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from corefw.net import descriptors
from corefw.qmp import protocol
from corefw.qmp.commands.context import Context
from corefw.qmp.documents import CommandInfo, NameInfo, VersionInfo
from corefw.qmp.introspection import describe
from corefw.qmp.protocol import QmpError


def qmp_capabilities(context: Context, enable: Sequence[Literal["oob"]] = ()) -> None:
    """End negotiation mode; the first command of every client."""
    context.negotiate(enable)


def query_version(_: Context) -> VersionInfo:
    """The version of QEMU that the commands are taken from, and in "package" this program's own."""
    major, minor, micro = protocol.QEMU_VERSION
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": protocol.PACKAGE}


def query_commands(context: Context) -> list[CommandInfo]:
    """The names of all commands."""
    return [{"name": name} for name in sorted(context.commands)]


def query_name(context: Context) -> NameInfo:
    """The engine's name; nothing if it has none."""
    return {"name": context.engine.name} if context.engine.name else {}


def query_qmp_schema(context: Context) -> list[Any]:
    """Every command and event with its types, as QAPI's SchemaInfo."""
    return list(describe(context.commands, context.engine.settings))


def getfd(context: Context, fdname: str) -> None:
    """Keep the file descriptor that comes with this request (SCM_RIGHTS) under a name, for the URI fd:NAME."""
    fd = context.take_fd()
    if fd is None:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")
    if fdname[:1].isdecimal() or not fdname:
        os.close(fd)
        raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
    descriptors.put(fdname, fd)


def closefd(_: Context, fdname: str) -> None:
    """Close a file descriptor that `getfd` keeps."""
    fd = descriptors.take(fdname)
    if fd is None:
        raise QmpError(f"File descriptor named '{fdname}' not found")
    os.close(fd)


def quit_engine(context: Context) -> None:
    """End the engine and its guest."""
    context.quit()
