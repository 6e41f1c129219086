"""`optimum-cli export blip2rt`: what `blip2rt export` does, where people of optimum look for it.

optimum reads every file of this name space when its command line starts, so all that is heavy is imported by `run`.
"""

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from blip2rt.arguments import add_export


class ExportBlip2rt(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
    """The command of optimum."""

    COMMAND = CommandInfo(name="blip2rt", help="Build a blip2rt engine directory of a BLIP-2 checkpoint.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """The options of `blip2rt export`."""
        add_export(parser)

    def run(self) -> None:
        """Build it; a failure ends the process with the status that `blip2rt export` has."""
        from blip2rt.cli import run_command
        from blip2rt.cli_export import export

        status = run_command(export, self.args)
        if status:
            sys.exit(status)


REGISTER_COMMANDS = [(ExportBlip2rt, ExportCommand)]
