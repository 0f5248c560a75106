"""Commands about migration: QEMU's migration object, under its QMP names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from corefw.errors import SettingsError, did_you_mean
from corefw.qmp.answers import check_document, migration_info
from corefw.qmp.channels import uri_of
from corefw.qmp.commands.context import Context
from corefw.qmp.documents import (
    MigrationCapabilityStatus,
    MigrationChannel,
    MigrationInfo,
    ParameterChange,
    ParameterValues,
)
from corefw.qmp.protocol import QmpError
from corefw.settings import MAX_DOWNTIME
from corefw.states import MigrationStatus


def migrate(
    context: Context,
    uri: str = "",
    channels: Sequence[MigrationChannel] = (),
    blk: bool = False,
    inc: bool = False,
    detach: bool = False,
    resume: bool = False,
) -> None:
    """Start to migrate the guest; returns at once, with or without `detach`, as in QEMU."""
    del detach
    if blk or inc:
        raise SettingsError("capability 'block' is not supported by any installed plugin")
    context.engine.migrate(uri_of(uri, channels), resume=resume)


def x_migfw_check(context: Context, uri: str = "", postcopy: bool = False) -> object:
    """Whether a migration to `uri` would succeed, and what it would be like. Changes nothing and takes some seconds.
    Without `uri` only this side is checked. `postcopy` asks about postcopy, too."""
    return check_document(context.engine.check(uri or None, postcopy=postcopy))


def migrate_incoming(
    context: Context, uri: str = "", channels: Sequence[MigrationChannel] = (), exit_on_error: bool = True
) -> None:
    """Wait for a guest, in an engine that was started with `--incoming`."""
    context.engine.migrate_incoming(uri_of(uri, channels), exit_on_error=exit_on_error)


def migrate_cancel(context: Context) -> None:
    """Cancel the migration. Does nothing if there is none."""
    context.engine.cancel()


def migrate_continue(context: Context, state: MigrationStatus) -> None:
    """Go on from `state`, in which the migration waits (pre-switchover)."""
    context.engine.continue_migration(state)


def migrate_start_postcopy(context: Context) -> None:
    """Switch the running migration to postcopy."""
    context.engine.start_postcopy()


def migrate_pause(context: Context) -> None:
    """Break the connection of a postcopy migration on purpose, so that it can be recovered over another."""
    context.engine.pause_migration()


def migrate_recover(context: Context, uri: str) -> None:
    """On the destination: wait at `uri` for the source of a paused postcopy migration."""
    context.engine.recover(uri)


def query_migrate(context: Context) -> MigrationInfo:
    """How the migration is going, or how it went."""
    return migration_info(context.engine.report())


def x_migfw_transport(context: Context, uri: str) -> object:
    """What the engine's transport for `uri` can do. Does not dial; a wrong URI is refused as by `migrate`."""
    transport = context.engine.plugins.transport(uri, context.engine.settings)
    transport.check_outgoing()
    return {
        "scheme": transport.uri.scheme,
        "return-path": transport.features.return_path,
        "multi-channel": transport.features.multi_channel,
    }


# -- settings ----------------------------------------------------------------------------------------------------------


def migrate_set_capabilities(context: Context, capabilities: Sequence[MigrationCapabilityStatus]) -> None:
    """Switch capabilities, all of them or none. Earlier names are accepted."""
    context.engine.set_capabilities({one["capability"]: one["state"] for one in capabilities})


def query_migrate_capabilities(context: Context) -> list[MigrationCapabilityStatus]:
    """Every capability, and whether it is on."""
    enabled = context.engine.settings.capabilities()
    return [{"capability": name, "state": state} for name, state in enabled.items()]


def migrate_set_parameters(context: Context, **parameters: ParameterChange) -> None:
    """Change parameters, all of them or none; also while a migration runs. Earlier names are accepted, and null is
    accepted for an empty string and for a list that is not to be set."""
    for name in parameters:
        try:
            context.engine.settings.declared_parameter(name)
        except SettingsError:
            hint = did_you_mean(name, context.engine.settings.parameters())
            raise QmpError(f"Parameter '{name}' is unexpected{hint}") from None
    context.engine.set_parameters(parameters)


def query_migrate_parameters(context: Context) -> ParameterValues:
    """The value of every parameter that has one: block-bitmap-mapping may have none."""
    return {name: value for name, value in context.engine.settings.parameters().items() if value is not None}


_MAX_DOWNTIME_SECONDS: Final = MAX_DOWNTIME // 1000


def migrate_set_speed(context: Context, value: int) -> None:
    """The same as migrate-set-parameters max-bandwidth, in bytes per second."""
    context.engine.set_parameters({"max-bandwidth": value})


def migrate_set_downtime(context: Context, value: float) -> None:
    """The same as migrate-set-parameters downtime-limit, but in seconds."""
    if not 0 <= value <= _MAX_DOWNTIME_SECONDS:
        raise QmpError(
            f"Parameter 'downtime_limit' expects an integer in the range of 0 to {_MAX_DOWNTIME_SECONDS} seconds"
        )
    context.engine.set_parameters({"downtime-limit": round(value * 1000)})


def migrate_set_cache_size(context: Context, value: int) -> None:
    """The same as migrate-set-parameters xbzrle-cache-size, in bytes."""
    context.engine.set_parameters({"xbzrle-cache-size": value})


def query_migrate_cache_size(context: Context) -> int:
    """Bytes of the XBZRLE cache."""
    return context.engine.settings.integer("xbzrle-cache-size")
