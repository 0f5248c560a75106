"""What the settings of a migration demand of one another and of its transport.

Asked when a migration begins: before that a setting may still be on its way. corefw.settings refuses at once what can
never be right.
"""

from __future__ import annotations

from corefw.channel import Transport
from corefw.engine.preempt import check_channels
from corefw.errors import SettingsError
from corefw.settings import Settings


def check_settings(settings: Settings, transport: Transport) -> None:
    """Raise SettingsError for settings that make no sense together, or that this transport cannot have."""
    start = settings.parameter("x-migfw-postcopy-start")
    if start != "on-command" and not settings.capability("postcopy-ram"):
        raise SettingsError(f"parameter 'x-migfw-postcopy-start' is '{start}', which needs capability 'postcopy-ram'")
    uri = transport.uri
    if not transport.features.return_path:
        for name, why in (("postcopy-ram", ", which postcopy needs"), ("return-path", "")):
            if settings.capability(name):
                raise SettingsError(
                    f"'{uri}': '{uri.scheme}:' has no return path{why} (switch capability '{name}' off)"
                )
    check_channels(settings, transport)
