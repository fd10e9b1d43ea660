"""Prepares a dataset from source files, from start to end."""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tim4rec_jax
from tim4rec_jax.data_prep import files, filters, read, writer
from tim4rec_jax.data_prep.database import connect
from tim4rec_jax.data_prep.layout import check_columns
from tim4rec_jax.data_prep.sources import SOURCES, Source, read_titles
from tim4rec_jax.errors import UserError


def prepare(
    name: str, flags: argparse.Namespace, inputs: list[str], folder: Path, console: Console
) -> dict:
    """Reads, filters and writes a dataset to `folder`.

    Args:
      name: a key of `SOURCES`, the family of files to read.
      flags: of the command line: filters, order, what to do with bad rows.
      inputs: paths or globs of the files.
      folder: an empty folder. Temporary files are written beside it.
      console: where progress is shown.

    Returns:
      The content of dataset.json.

    Raises:
      UserError: see `files.find_files`, `read.read_file` and `filters.apply`.
    """
    source, work = SOURCES[name], folder.parent
    paths = files.find_files(inputs, source.members, work)
    settings = filters.Filters(
        flags.deduplicate, flags.min_rating, flags.since, flags.until, flags.k_core
    )
    where = getattr(flags, "where", None)
    skipped: collections.Counter[str] = collections.Counter()
    with (
        contextlib.closing(connect(work, flags.memory_limit)) as con,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        console.status("") as status,
    ):
        # Checksums are computed while DuckDB reads, because both mostly wait for the disk or zlib.
        fingerprints = [pool.submit(files.fingerprint, path) for path in paths]
        read.create(con)
        for path in paths:
            status.update(f"reading {path}")
            skipped += _read_file(con, source, path, flags)
        sources = [fingerprint.result() for fingerprint in fingerprints]
        status.update("filtering")
        steps = filters.apply(con, settings, where=where, unreadable=skipped[read.UNREADABLE])
        status.update("writing")
        metadata = {
            "name": flags.name,
            "filters": dataclasses.asdict(settings) | {"where": where},
            "steps": [dataclasses.asdict(step) for step in steps],
            "bad_rows": dict(skipped),
            "sources": sources,
            "prepared_by": f"tim4rec-jax {tim4rec_jax.__version__}",
        }
        return writer.write(
            con,
            folder,
            metadata,
            order=flags.order,
            shard_events=flags.shard_events,
            titles=read_titles(files.find_beside(inputs, source.titles, work)),
        )


def _read_file(con, source: Source, path: Path, flags) -> collections.Counter[str]:
    layout = source.layout(path, flags)
    if flags.min_rating is None:
        layout = dataclasses.replace(layout, rating=None)
    elif layout.rating is None:
        raise UserError(f"{path} has no ratings; leave out --min-rating")
    remedy = "name yours with --user, --item, --time, --rating"
    if not hasattr(flags, "user"):
        remedy = "read other files with `python -m data_prep table`"
    check_columns(path, layout, remedy)
    return read.read_file(con, path, layout, skip=flags.on_bad_row == "skip")


def print_steps(metadata: dict, console: Console) -> None:
    """Prints how many events, users and items each step left and removed."""
    table = Table("", "events", "users", "items", "events removed", title=metadata["name"])
    for column in table.columns[1:]:
        column.justify = "right"
    before = None
    for step in metadata["steps"]:
        counts = [step[key] for key in ("events", "users", "items")]
        removed = "" if before is None else f"{before - step['events']:,}"
        table.add_row(step["step"], *("" if n is None else f"{n:,}" for n in counts), removed)
        before = step["events"]
    console.print(table)
    for reason, count in metadata["bad_rows"].items():
        console.print(f"skipped {count:,}: {reason}")
