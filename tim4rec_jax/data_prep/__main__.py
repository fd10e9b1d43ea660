"""`python -m data_prep`: the command line."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from rich.console import Console

from tim4rec_jax.data import open_dataset
from tim4rec_jax.data_prep import flags as flags_
from tim4rec_jax.data_prep import inspect, synthetic, writer
from tim4rec_jax.data_prep.download import fetch
from tim4rec_jax.data_prep.failures import one_sentence
from tim4rec_jax.data_prep.prepare import prepare, print_steps
from tim4rec_jax.data_prep.sources import MD5, SOURCES
from tim4rec_jax.errors import UserError, one_line, run_main


def main(
    arguments: Sequence[str] | None = None,
    console: Console | None = None,
    prog: str = "python -m data_prep",
) -> None:
    """Runs the command line, or the given arguments, and prints to `console`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = flags_.parser(prog=prog).parse_args(arguments)
    flags.again = shlex.join(["python", "-m", "data_prep", *arguments])
    console = console or Console(highlight=False)
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{argument} is no UTF-8; write or rename it so") from error
    if flags.command == "inspect":
        _inspect(flags, console)
    else:
        with one_sentence(flags.out):
            _make(flags, console)


def _inspect(flags: argparse.Namespace, console: Console) -> None:
    # Here and not above: drawing takes longer to import than everything else.
    from tim4rec_jax.data_prep import plot

    dataset = open_dataset(flags.directory)
    figures = inspect.statistics(dataset)
    inspect.print_statistics(dataset, figures, console)
    inspect.print_doubts(dataset, console)
    path = flags.plot or flags.directory / "inspect.png"
    plot.plot(dataset, figures, path)
    console.out(one_line(f"picture: {path}"))


def _make(flags: argparse.Namespace, console: Console) -> None:
    flags.name = flags.name or flags.out.absolute().name
    with writer.staging(flags.out, overwrite=flags.overwrite) as folder:
        if flags.command == "synthetic":
            metadata = synthetic.write(flags, folder)
        else:
            metadata = prepare(flags.command, flags, _inputs(flags, console), folder, console)
    if flags.command == "synthetic":
        synthetic.print_oracle(metadata, console)
    else:
        print_steps(metadata, console)
        inspect.print_doubts(open_dataset(flags.out), console)
    counts = ", ".join(f"{metadata[key]:,} {key}" for key in ("users", "items", "events"))
    days = f"{inspect.day(metadata['first_time'])} to {inspect.day(metadata['last_time'])}"
    console.out(one_line(f"{flags.out}: {counts}, {days}"))


def _inputs(flags: argparse.Namespace, console: Console) -> list[str]:
    """The paths given, or what was downloaded where none is."""
    given = (flags.source or []) + getattr(flags, "files", [])
    if given:
        return given
    url = SOURCES[flags.command].url
    wanted = {"movielens": "edition", "kuairand": "edition", "amazon": "category"}
    flag = wanted.get(flags.command)
    if url is None or (flag and getattr(flags, flag) is None):
        remedy = f" or name the {flag} to download" if flag else ""
        raise UserError(
            f"{flags.command}: nothing to read; pass --source PATH{remedy} "
            f"(`python -m data_prep {flags.command} --help`)"
        )
    address = url(flags)
    md5 = MD5.get(address.rsplit("/", 1)[-1])
    command = flags.again if len(flags.again) < 100 else f"python -m data_prep {flags.command} ..."
    return [str(fetch(address, flags.cache, md5=md5, command=command, console=console))]


if __name__ == "__main__":
    sys.exit(run_main(main))
