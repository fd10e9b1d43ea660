"""`python -m tim4rec_jax.serving`: the command line."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from tim4rec_jax.errors import UserError, run_main
from tim4rec_jax.serving import batch_job as batch
from tim4rec_jax.serving import command, explain, export
from tim4rec_jax.serving.http import app as serve

# Each module adds its own command: a parser whose default `run` takes the flags.
COMMANDS = (command, batch, export, explain, serve)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Runs the command line, or the given arguments."""
    parser = _Parser(
        prog="python -m tim4rec_jax.serving",
        description="Recommendations from a run of train.py.",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(subparsers)
    flags = parser.parse_args(arguments)
    return flags.run(flags)


if __name__ == "__main__":
    sys.exit(run_main(main))
