"""The table of commands: from a name to a function, whose typed keyword signature is the command's schema (schema.py).

Every command is in this table or comes from a plugin. Names, fields and texts are QEMU 7.2's, with what QEMU 11.1 adds
and what only the QEMU of May 2018 had. A command does everything it was asked to do, or raises a MigfwError.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from corefw.errors import FOREIGN, PluginError
from corefw.qmp.commands import block, control, guest, migration, monitor, queries, transaction
from corefw.qmp.commands.context import Context
from corefw.qmp.schema import Signature, signature

if TYPE_CHECKING:
    from corefw.engine import Engine

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Command:
    """One command. `run(context, keywords)` takes what `signature.bind` returned.

    out_of_band   may run at once, while earlier commands are still waiting (QEMU's allow-oob)
    """

    name: str
    signature: Signature
    run: Callable[[Context, dict[str, object]], object]
    out_of_band: bool
    help: str


CORE: Final[Mapping[str, Callable[..., object]]] = {
    "qmp_capabilities": control.qmp_capabilities,
    "query-version": control.query_version,
    "query-commands": control.query_commands,
    "query-name": control.query_name,
    "query-qmp-schema": control.query_qmp_schema,
    "query-events": queries.query_events,
    "human-monitor-command": monitor.human_monitor_command,
    "query-uuid": queries.query_uuid,
    "query-kvm": queries.query_kvm,
    "query-target": queries.query_target,
    "query-machines": queries.query_machines,
    "query-current-machine": queries.query_current_machine,
    "query-memory-size-summary": queries.query_memory_size_summary,
    **dict.fromkeys(queries.EMPTY, queries.query_nothing),
    "getfd": control.getfd,
    "closefd": control.closefd,
    "quit": control.quit_engine,
    "query-status": guest.query_status,
    "stop": guest.stop,
    "cont": guest.cont,
    "x-migfw-status": guest.x_migfw_status,
    "x-migfw-verify": guest.x_migfw_verify,
    "x-migfw-check": migration.x_migfw_check,
    "query-block": block.query_block,
    "query-named-block-nodes": block.query_named_block_nodes,
    "block-dirty-bitmap-add": block.block_dirty_bitmap_add,
    "block-dirty-bitmap-remove": block.block_dirty_bitmap_remove,
    "block-dirty-bitmap-clear": block.block_dirty_bitmap_clear,
    "block-dirty-bitmap-enable": block.block_dirty_bitmap_enable,
    "block-dirty-bitmap-disable": block.block_dirty_bitmap_disable,
    "block-dirty-bitmap-merge": block.block_dirty_bitmap_merge,
    "transaction": transaction.transaction,
    "x-debug-block-dirty-bitmap-sha256": block.x_debug_block_dirty_bitmap_sha256,
    "x-migfw-dirty-ranges": block.x_migfw_dirty_ranges,
    "migrate": migration.migrate,
    "migrate-incoming": migration.migrate_incoming,
    "x-migfw-transport": migration.x_migfw_transport,
    "migrate_cancel": migration.migrate_cancel,
    "migrate-continue": migration.migrate_continue,
    "migrate-start-postcopy": migration.migrate_start_postcopy,
    "migrate-pause": migration.migrate_pause,
    "migrate-recover": migration.migrate_recover,
    "query-migrate": migration.query_migrate,
    "migrate-set-capabilities": migration.migrate_set_capabilities,
    "query-migrate-capabilities": migration.query_migrate_capabilities,
    "migrate-set-parameters": migration.migrate_set_parameters,
    "query-migrate-parameters": migration.query_migrate_parameters,
    "migrate_set_speed": migration.migrate_set_speed,
    "migrate_set_downtime": migration.migrate_set_downtime,
    "migrate-set-cache-size": migration.migrate_set_cache_size,
    "query-migrate-cache-size": migration.query_migrate_cache_size,
}

OUT_OF_BAND: Final = frozenset({"migrate-pause", "migrate-recover"})
"""As in QEMU: they have to get through while another command hangs on a broken network."""


def command_table(engine: Engine) -> dict[str, Command]:
    """Every command of this engine. What plugins add that cannot be a command is logged and left out."""
    table = {name: _core(name, function) for name, function in CORE.items()}
    for name, added in engine.plugins.commands(engine).items():
        try:
            if name in CORE:
                raise PluginError("the core has a command of that name")
            table[name] = _plugin(name, added.function)
        except FOREIGN as error:
            log.error("plugin '%s' adds the command '%s', which is left out: %s", added.plugin, name, error)
    return table


def _core(name: str, function: Callable[..., object]) -> Command:
    def run(context: Context, keywords: dict[str, object]) -> object:
        return function(context, **keywords)

    return Command(name, signature(function, skip=1), run, name in OUT_OF_BAND, _first_line(function))


def _plugin(name: str, function: Callable[..., object]) -> Command:
    def run(_: Context, keywords: dict[str, object]) -> object:
        return function(**keywords)

    return Command(name, signature(function), run, False, _first_line(function))


def _first_line(function: Callable[..., object]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
