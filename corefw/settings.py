"""Capabilities, parameters and properties: what a migration may use, and how.

Every name is declared in a table with its default and range. A change of several settings is checked as a whole and
then applied completely or not at all. Invariant: a capability that no installed plugin implements is refused when it
is enabled, never accepted and ignored.

The tables have every capability and parameter of QEMU 7.2 and of QEMU 11.1, and those that only earlier versions had.
Source: migrate_caps_check, migrate_params_check and the QAPI schema of both. Sizes are bytes, times are milliseconds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final

from corefw.declarations import Capability, Check, Declarations, Kind, Parameter, Value
from corefw.errors import SettingsError, did_you_mean

MAX_DOWNTIME: Final = 2_000_000
MAX_WAIT: Final = 2**32 - 1
UNLIMITED: Final = 0
QMP_MAX_BANDWIDTH: Final = 128 << 20
"""QEMU 7.2's default; QEMU of May 2018 had 32 MiB/s. The command line's own default is UNLIMITED."""

_COMPRESSIONS: Final = ("none", "zlib", "zstd", "qatzip", "qpl", "uadk")
_MODES: Final = ("normal", "cpr-reboot", "cpr-transfer", "cpr-exec")
_ZERO_PAGES: Final = ("none", "legacy", "multifd")

CAPABILITIES: Final = (
    Capability("xbzrle", "send only the differences of pages that were sent before (XBZRLE)"),
    Capability("rdma-pin-all", "pin all RAM at the start (RDMA)"),
    Capability("auto-converge", "slow the guest down until the migration converges"),
    Capability("zero-blocks", "send zero chunks of storage compactly (until QEMU 11.0)"),
    Capability("compress", "compress each page, in several threads (until QEMU 9.0)"),
    Capability("events", "emit MIGRATION events"),
    Capability("postcopy-ram", "start the guest on the destination before its RAM has arrived"),
    Capability("x-colo", "keep the destination up to date with checkpoints, for fail-over (COLO)"),
    Capability("release-ram", "free the source's RAM while postcopy sends it"),
    Capability("block", "migrate storage in the stream (until QEMU 9.0)"),
    Capability("return-path", "let the destination answer: the migration completes when it confirms the guest"),
    Capability("pause-before-switchover", "wait in pre-switchover for migrate-continue"),
    Capability("multifd", "send RAM over several channels", aliases=("x-multifd",)),
    Capability("dirty-bitmaps", "migrate dirty bitmaps of block devices, partly during postcopy"),
    Capability("postcopy-blocktime", "measure how long page faults block the guest"),
    Capability("late-block-activate", "do not activate the disks before the guest starts"),
    Capability("x-ignore-shared", "do not send RAM that both hosts share"),
    Capability("validate-uuid", "refuse a guest with another UUID"),
    Capability("background-snapshot", "store a snapshot of the running guest as it was at the start"),
    Capability("zero-copy-send", "let the kernel send guest pages without a copy (multifd)"),
    Capability("postcopy-preempt", "send requested pages over a channel of their own"),
    Capability("switchover-ack", "switch over only after the destination has agreed (since QEMU 8.1)"),
    Capability("dirty-limit", "slow down the virtual CPUs that write most (since QEMU 8.2)"),
    Capability("mapped-ram", "store each page at a fixed offset of a file (since QEMU 9.0)"),
)

PARAMETERS: Final = (
    Parameter("announce-initial", Kind.MILLISECONDS, 50, "delay before the first announcement", maximum=100_000),
    Parameter("announce-max", Kind.MILLISECONDS, 550, "maximum delay between two announcements", maximum=100_000),
    Parameter("announce-rounds", Kind.INTEGER, 5, "number of announcements", 1, 1000),
    Parameter("announce-step", Kind.MILLISECONDS, 100, "increase of the delay after each announcement", 1, 10_000),
    Parameter("compress-level", Kind.INTEGER, 1, "0 stores, 9 compresses best", maximum=9),
    Parameter("compress-threads", Kind.INTEGER, 8, "number of threads that compress", 1, 255),
    Parameter("compress-wait-thread", Kind.BOOLEAN, True, "wait for a free thread, or else do not compress"),
    Parameter("decompress-threads", Kind.INTEGER, 2, "number of threads that decompress", 1, 255),
    Parameter("throttle-trigger-threshold", Kind.INTEGER, 50, "percent of sent bytes dirtied: throttle", 1, 100),
    Parameter("cpu-throttle-initial", Kind.INTEGER, 20, "initial throttling, in percent of CPU time", 1, 99),
    Parameter("cpu-throttle-increment", Kind.INTEGER, 10, "increase of the throttling at each step, in percent", 1, 99),
    Parameter("cpu-throttle-tailslow", Kind.BOOLEAN, False, "smaller steps near the end"),
    Parameter("max-cpu-throttle", Kind.INTEGER, 99, "maximum throttling, in percent of CPU time", 1, 99),
    Parameter("tls-creds", Kind.STRING, "", "TLS credentials; empty means no TLS"),
    Parameter("tls-hostname", Kind.STRING, "", "host name to expect in the destination's certificate"),
    Parameter("tls-authz", Kind.STRING, "", "authorization of the sources' certificates"),
    Parameter("max-bandwidth", Kind.RATE, QMP_MAX_BANDWIDTH, "maximum rate; 0 means no limit", maximum=2**64 - 1),
    Parameter("avail-switchover-bandwidth", Kind.RATE, 0, "expected bandwidth; 0: measured", maximum=2**64 - 1),
    Parameter("max-postcopy-bandwidth", Kind.RATE, 0, "the same in postcopy; 0: no limit", maximum=2**64 - 1),
    Parameter("downtime-limit", Kind.MILLISECONDS, 300, "maximum downtime of the guest", maximum=MAX_DOWNTIME),
    Parameter("x-checkpoint-delay", Kind.MILLISECONDS, 20_000, "time between two COLO checkpoints", maximum=2**32 - 1),
    Parameter("block-incremental", Kind.BOOLEAN, False, "migrate only the storage that differs from the backing image"),
    Parameter("multifd-channels", Kind.INTEGER, 2, "number of channels", 1, 255, aliases=("x-multifd-channels",)),
    Parameter("x-multifd-page-count", Kind.INTEGER, 16, "number of pages in a multifd packet", 1, 10000),
    Parameter("multifd-compression", Kind.CHOICE, "none", "compression on multifd channels", choices=_COMPRESSIONS),
    Parameter("multifd-zlib-level", Kind.INTEGER, 1, "0 stores, 9 compresses best", maximum=9),
    Parameter("multifd-zstd-level", Kind.INTEGER, 1, "0 is zstd's own default, 20 compresses best", maximum=20),
    Parameter("multifd-qatzip-level", Kind.INTEGER, 1, "9 compresses best", 1, 9),
    Parameter("xbzrle-cache-size", Kind.SIZE, 64 << 20, "size of the XBZRLE cache", minimum=4096, power_of_two=True),
    Parameter("block-bitmap-mapping", Kind.OBJECTS, None, "names of block nodes and bitmaps in the stream"),
    Parameter("x-vcpu-dirty-limit-period", Kind.MILLISECONDS, 1000, "interval of dirty-limit's measurements", 1, 1000),
    Parameter("vcpu-dirty-limit", Kind.INTEGER, 1, "MB/s that a virtual CPU may dirty under dirty-limit", 1),
    Parameter("mode", Kind.CHOICE, "normal", "normal, or one of QEMU's live update modes", choices=_MODES),
    Parameter("zero-page-detection", Kind.CHOICE, "multifd", "where zero pages are detected", choices=_ZERO_PAGES),
    Parameter("direct-io", Kind.BOOLEAN, False, "bypass the page cache (mapped-ram)"),
    Parameter("x-rdma-chunk-size", Kind.SIZE, 1 << 20, "size of a registered chunk (RDMA)", 4096, power_of_two=True),
    Parameter("cpr-exec-command", Kind.LIST, (), "command line of the QEMU that mode cpr-exec starts"),
    Parameter(
        "x-migfw-confirm-timeout",
        Kind.MILLISECONDS,
        300_000,
        "how long the source waits for the destination's confirmation; 0 means no limit",
        maximum=MAX_WAIT,
    ),
    Parameter(
        "x-migfw-incoming-timeout",
        Kind.MILLISECONDS,
        60_000,
        "how long the source of an incoming migration may send almost nothing; 0 means no limit",
        maximum=MAX_WAIT,
    ),
    Parameter("x-migfw-prealloc", Kind.BOOLEAN, True, "allocate the guest's RAM while the destination waits"),
    Parameter(
        "x-migfw-postcopy-start",
        Kind.CHOICE,
        "on-command",
        "when a migration with postcopy-ram switches to postcopy",
        choices=("on-command", "now", "after-first-pass", "when-stuck"),
    ),
    Parameter(
        "x-migfw-liveness",
        Kind.SECONDS,
        60,
        "seconds of silence after which a connection counts as broken; 0 means no limit",
        maximum=86_400,
    ),
    Parameter(
        "x-migfw-reconnect",
        Kind.INTEGER,
        0,
        "how often a source whose connection broke in postcopy dials again by itself; -1 means for ever",
        minimum=-1,
        maximum=2**31 - 1,
    ),
    Parameter("x-migfw-timeout", Kind.MILLISECONDS, 0, "how long a migration may take; 0 means no limit"),
    Parameter("x-migfw-max-passes", Kind.INTEGER, 0, "how many passes a migration may take; 0 means no limit"),
    Parameter(
        "x-migfw-on-timeout",
        Kind.CHOICE,
        "cancel",
        "what happens when either limit is reached",
        choices=("cancel", "switchover"),
    ),
)

IMPLEMENTED_BY_CORE: Final = frozenset(
    {
        *("events", "return-path", "pause-before-switchover", "switchover-ack", "max-bandwidth", "downtime-limit"),
        "postcopy-blocktime",
        *("x-migfw-confirm-timeout", "x-migfw-incoming-timeout", "x-migfw-prealloc", "x-migfw-reconnect"),
        "x-migfw-liveness",
        *("x-migfw-timeout", "x-migfw-max-passes", "x-migfw-on-timeout", "x-migfw-postcopy-start"),
    }
)

PROPERTIES: Final[Mapping[str, tuple[bool, str]]] = {
    "store-global-state": (True, "send the run state in the section 'globalstate'"),
    "only-migratable": (False, "refuse whatever would block a migration"),
    "send-configuration": (True, "send the configuration section"),
    "send-section-footer": (True, "send a footer after every section"),
    "allow-any-user": (False, "let every user of this host migrate in through an abstract UNIX socket (unix:@NAME)"),
    "send-vmdescription": (
        True,
        "send the JSON description at the end of the stream (the opposite of QEMU's suppress-vmdesc)",
    ),
}
"""Machine properties, as in QEMU: name -> (default, help). Set when the engine is created, not over QMP."""


def _postcopy_with_compress(capabilities: Mapping[str, bool], _: Mapping[str, Value]) -> str | None:
    if capabilities["postcopy-ram"] and capabilities["compress"]:
        return "Postcopy is not currently compatible with compression"
    return None


def _ack_without_return_path(capabilities: Mapping[str, bool], _: Mapping[str, Value]) -> str | None:
    if capabilities["switchover-ack"] and not capabilities["return-path"]:
        return "Capability 'switchover-ack' requires capability 'return-path'"
    return None


def _preempt_without_postcopy(capabilities: Mapping[str, bool], _: Mapping[str, Value]) -> str | None:
    if capabilities["postcopy-preempt"] and not capabilities["postcopy-ram"]:
        return "Postcopy preempt requires postcopy-ram"
    return None


CHECKS: Final[tuple[Check, ...]] = (_postcopy_with_compress, _preempt_without_postcopy, _ack_without_return_path)


class Settings:
    """The present values of all capabilities, parameters and properties. Thread-safe."""

    def __init__(self, declarations: Iterable[Declarations] = ()) -> None:
        self._lock = threading.Lock()
        self._capabilities: dict[str, Capability] = {}
        self._parameters: dict[str, Parameter] = {}
        self._names: dict[str, str] = {}
        self._implemented: set[str] = set()
        self._checks: list[Check] = []
        core = Declarations(CAPABILITIES, PARAMETERS, IMPLEMENTED_BY_CORE, CHECKS)
        for declared in (core, *declarations):
            entries: tuple[Capability | Parameter, ...] = (*declared.capabilities, *declared.parameters)
            for entry in entries:
                for name in (entry.name, *entry.aliases):
                    if name in self._names:
                        raise SettingsError(f"'{name}' is declared by two plugins")
                    self._names[name] = entry.name
            self._capabilities.update({one.name: one for one in declared.capabilities})
            self._parameters.update({one.name: one for one in declared.parameters})
            self._implemented |= declared.implements
            self._checks += declared.checks
        if unknown := self._implemented - self._names.keys():
            raise SettingsError(f"plugins implement settings that no plugin declares: {', '.join(sorted(unknown))}")
        self._enabled = dict.fromkeys(self._capabilities, False)
        self._values: dict[str, Value] = {one.name: one.default for one in self._parameters.values()}
        self._properties = {name: default for name, (default, _) in PROPERTIES.items()}

    # -- reading ---------------------------------------------------------------------------------------------------

    def capability(self, name: str) -> bool:
        return self._enabled[self._names[name]]

    def boolean(self, name: str) -> bool:
        """A parameter that is on or off."""
        value = self._values[self._names[name]]
        assert isinstance(value, bool)
        return value

    def integer(self, name: str) -> int:
        """The value of an integer parameter: bytes, milliseconds or a count."""
        value = self._values[self._names[name]]
        assert isinstance(value, int)
        return value

    def parameter(self, name: str) -> Value:
        return self._values[self._names[name]]

    def property(self, name: str) -> bool:
        return self._properties[name]

    def capabilities(self) -> dict[str, bool]:
        return dict(self._enabled)

    def parameters(self) -> dict[str, Value]:
        return dict(self._values)

    def declared_parameter(self, name: str) -> Parameter:
        """Raises SettingsError for an unknown name."""
        return self._parameters[self._known(name, self._parameters, "parameter")]

    def declared_capability(self, name: str) -> Capability:
        return self._capabilities[self._known(name, self._capabilities, "capability")]

    def implemented(self, name: str) -> bool:
        return self._names[name] in self._implemented

    # -- changing --------------------------------------------------------------------------------------------------

    def set_capabilities(self, changes: Mapping[str, object]) -> None:
        """Change several capabilities, all or none. Raises SettingsError. Engines refuse this during a migration."""
        with self._lock:
            wanted = dict(self._enabled)
            for name, state in changes.items():
                real = self._known(name, self._capabilities, "capability")
                if not isinstance(state, bool):
                    raise SettingsError(f"capability '{real}' expects true or false, got {state!r}")
                if state and real not in self._implemented:
                    raise SettingsError(f"capability '{real}' is not supported by any installed plugin")
                wanted[real] = state
            self._cross_check(wanted, self._values)
            self._enabled = wanted

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Change several parameters, all or none, also during a migration. Raises SettingsError."""
        with self._lock:
            wanted = dict(self._values)
            for name, value in changes.items():
                real = self._known(name, self._parameters, "parameter")
                checked = self._parameters[real].check(value)
                if checked != wanted[real] and real not in self._implemented:
                    raise SettingsError(f"parameter '{real}' is not supported by any installed plugin")
                wanted[real] = checked
            self._cross_check(self._enabled, wanted)
            self._values = wanted

    def set_property(self, name: str, state: bool) -> None:
        """Set a property, before the engine is created. Raises SettingsError for an unknown name."""
        if name not in self._properties:
            hint = did_you_mean(name, self._properties)
            raise SettingsError(f"no property '{name}'{hint}: expected one of {', '.join(self._properties)}")
        self._properties[name] = state

    def _known(self, name: str, table: Mapping[str, object], what: str) -> str:
        real = self._names.get(name)
        if real is None or real not in table:
            hint = did_you_mean(name, table)
            raise SettingsError(f"unknown {what} '{name}'{hint}: expected one of {', '.join(table)}")
        return real

    def _cross_check(self, capabilities: Mapping[str, bool], parameters: Mapping[str, Value]) -> None:
        for check in self._checks:
            if problem := check(capabilities, parameters):
                raise SettingsError(problem)


def as_json(settings: Settings) -> dict[str, Any]:
    """All settings as a JSON document."""
    return {
        "capabilities": settings.capabilities(),
        "parameters": settings.parameters(),
        "properties": {name: settings.property(name) for name in PROPERTIES},
    }
