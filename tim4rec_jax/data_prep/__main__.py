"""`python -m data_prep`: the command line."""

import argparse
import sys
from collections.abc import Sequence

import duckdb
from rich.console import Console

from tim4rec_jax.data import open_dataset
from tim4rec_jax.data_prep import flags as flags_
from tim4rec_jax.data_prep import synthetic, writer
from tim4rec_jax.data_prep.download import fetch
from tim4rec_jax.data_prep.inspect import day
from tim4rec_jax.data_prep.prepare import prepare, print_steps
from tim4rec_jax.data_prep.sources import MD5, SOURCES
from tim4rec_jax.errors import UserError, run_main


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> None:
    """Runs the command line, or the given arguments, and prints to `console`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = flags_.parser().parse_args(arguments)
    console = console or Console()
    if flags.command == "inspect":
        _inspect(flags, console)
        return
    try:
        _make(flags, console)
    except (duckdb.Error, OSError) as error:
        message = str(error).splitlines()[0]
        if "No space left on device" in message:  # DuckDB has several exceptions for it
            raise UserError(
                f"the disk that {flags.out} is on is full ({message}); make room there or choose "
                "another --out"
            ) from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise UserError(f"{message}; free memory or pass a higher --memory-limit") from error
        if isinstance(error, duckdb.IOException):
            raise UserError(message) from error
        raise
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise


def _inspect(flags: argparse.Namespace, console: Console) -> None:
    # Here and not above: drawing takes longer to import than everything else.
    from tim4rec_jax.data_prep import inspect, plot

    dataset = open_dataset(flags.directory)
    figures = inspect.statistics(dataset)
    inspect.print_statistics(dataset, figures, console)
    path = flags.plot or flags.directory / "inspect.png"
    plot.plot(dataset, figures, path)
    console.print(f"picture: {path}", soft_wrap=True)


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
    counts = ", ".join(f"{metadata[key]:,} {key}" for key in ("users", "items", "events"))
    days = f"{day(metadata['first_time'])} to {day(metadata['last_time'])}"
    console.print(f"{flags.out}: {counts}, {days}", highlight=False, soft_wrap=True)


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
    command = f"python -m data_prep {flags.command} ..."
    return [str(fetch(address, flags.cache, md5=md5, command=command, console=console))]


if __name__ == "__main__":
    sys.exit(run_main(main))
