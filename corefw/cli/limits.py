"""--timeout, --max-passes and --on-timeout of `migfw migrate`, as the engine's parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from corefw.cli.changes import Changes
from corefw.errors import UsageError
from corefw.quantities import parse_milliseconds

if TYPE_CHECKING:
    from corefw.cli.engines import EngineClient
    from corefw.settings import Value


def add_limits(
    changes: Changes, engine: EngineClient, timeout: str | None, max_passes: int | None, on_timeout: str | None
) -> None:
    """Each migration has its own limits: one that neither these options nor --param give is none. Raises UsageError."""
    if on_timeout is not None and timeout is None and max_passes is None:
        raise UsageError("--on-timeout says what happens at a limit: give --timeout or --max-passes as well")
    given = timeout is not None or max_passes is not None
    if not engine.is_migfw:
        if given:
            raise UsageError(
                "--timeout and --max-passes are kept by the engine, and a QEMU has no such limits"
                " (watch it with 'migfw status --watch', and end it with 'migfw cancel')"
            )
        return
    limits: dict[str, Value] = {
        "x-migfw-timeout": _duration(timeout) if timeout is not None else 0,
        "x-migfw-max-passes": max_passes or 0,
        "x-migfw-on-timeout": on_timeout or "cancel",
    }
    for name, value in limits.items():
        changes.parameters.setdefault(name, value)


def _duration(text: str) -> int:
    """Milliseconds. A number alone is refused: it might be seconds as well."""
    milliseconds = parse_milliseconds(text)
    if text.strip()[-1:].isdigit():
        raise UsageError(f"'--timeout {text}': give a unit, as in {text}s or {text}m")
    if not milliseconds:
        raise UsageError(f"'--timeout {text}': expected a time longer than zero (leave it out for no limit)")
    return milliseconds
