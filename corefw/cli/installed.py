"""The section of a command's --help that lists what installed plugins add. Only names are read; nothing is imported."""

from __future__ import annotations

import click

from corefw.cli.completion import entry_point_names


class WithInstalled(click.Command):
    """A command whose help ends with the installed URI schemes and kinds of machines."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_epilog(ctx, formatter)
        with formatter.section("Installed"):
            formatter.write_dl(
                [
                    ("URI schemes", ", ".join(entry_point_names("corefw.transport")) or "none"),
                    ("machines", ", ".join(entry_point_names("corefw.machine")) or "none"),
                    ("settings", "'migfw plugins --settings' lists capabilities, parameters and properties"),
                ]
            )
