"""`python -m tim4rec_jax.serving recommend`: one history from the shell, and flags all share."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tim4rec_jax.errors import UserError
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.serving.recommender import Recommendations, Recommender

_CSV = "a CSV file with the columns item and timestamp (whole seconds since 1970)"


def add_command(subparsers: Any) -> None:
    """Adds `recommend` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "recommend",
        help="recommend to one history",
        description="Recommends items to one history: --history, --file or standard input.",
    )
    add_history_flags(parser)
    add_shared_flags(parser)
    parser.add_argument("--sort", action="store_true", help="the events are not in order of time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_run)


def add_history_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `read_history` reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--history",
        nargs="+",
        metavar="ITEM@TIME,...",
        help="events, oldest first; times in whole seconds since 1970",
    )
    source.add_argument("--file", help=f"{_CSV}; - is standard input")


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which model recommends, and what."""
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="directory of a run, as train.py wrote it")
    add("--dataset", type=Path, help="the prepared dataset, if it has moved since the training")
    add("-k", "--top-k", type=int, default=10, metavar="K", help="how many items (default: 10)")
    add("--at", type=int, metavar="TIME", help="when they are shown, for models that know it")
    add("--include-seen", action="store_true", help="items of the history may come again")
    add("--allow", type=Path, metavar="FILE", help="recommend only these items, an id per line")
    add("--deny", type=Path, metavar="FILE", help="never recommend these items, an id per line")
    add_approximate_flag(parser)


def add_approximate_flag(parser: argparse.ArgumentParser) -> None:
    """Adds `--approximate`."""
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="search an index instead of scoring all items: for catalogues of 100,000 and more "
        "(pip install 'tim4rec-jax[ann]')",
    )


def load(flags: argparse.Namespace) -> tuple[Recommender, dict[str, Any]]:
    """The recommender and the options of its methods that the shared flags name.

    Raises:
        UserError: the run or a file cannot be read.
    """
    options = {
        "k": flags.top_k,
        "at": flags.at,
        "exclude_seen": not flags.include_seen,
        "allow": _read_ids(flags.allow),
        "deny": _read_ids(flags.deny),
    }
    enable_compilation_cache()
    return Recommender.load(
        flags.workdir, dataset=flags.dataset, approximate=flags.approximate
    ), options


def _run(flags: argparse.Namespace) -> None:
    items, timestamps = read_history(flags)
    recommender, options = load(flags)
    found = recommender.recommend(items, timestamps, sort=flags.sort, **options)
    if flags.json:
        values = dataclasses.asdict(found)
        if recommender.catalogue.titles:
            values["titles"] = [recommender.catalogue.title(item) for item in found.items]
        print(json.dumps(values, indent=2))
    else:
        _print(found, recommender, Console())


def read_history(flags: argparse.Namespace) -> tuple[list[str], list[int]]:
    """Items and times of `--history`, `--file` or standard input.

    Raises:
        UserError: there is none, or an event cannot be read.
    """
    if flags.history:
        events = [event for text in flags.history for event in text.split(",") if event]
        pairs = (event.rpartition("@")[::2] for event in events)
        return _parsed(
            pairs,
            "--history takes ITEM@TIME, times in whole seconds since 1970",
            [f"{event!r} is not" for event in events],
        )
    if flags.file is None and sys.stdin.isatty():
        raise UserError("name a history: --history ITEM@TIME,ITEM@TIME or --file history.csv")
    if flags.file in (None, "-"):
        return _read_csv(sys.stdin, "standard input")
    try:
        with open(flags.file, encoding="utf-8-sig", newline="") as file:
            return _read_csv(file, flags.file)
    except FileNotFoundError:
        raise UserError(f"--file: there is no file {flags.file}") from None


def _read_csv(file: Iterable[str], name: str) -> tuple[list[str], list[int]]:
    try:
        reader = csv.DictReader(file)
        if not {"item", "timestamp"} <= set(reader.fieldnames or ()):
            raise UserError(f"{name} is not {_CSV}")
        rows = [(reader.line_num, row["item"], row["timestamp"]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name} is not {_CSV}: {error}") from None
    return _parsed(
        ((item, time) for _, item, time in rows),
        f"{name} must have an item and a time in whole seconds since 1970 in every line",
        [f"line {number} has not" for number, _, _ in rows],
    )


def _parsed(pairs: Iterable[tuple[Any, Any]], rule: str, where: list[str]):
    items, timestamps = [], []
    for (item, time), place in zip(pairs, where, strict=True):
        try:
            timestamps.append(int(time))
        except (TypeError, ValueError):
            item = None
        if not item:
            raise UserError(f"{rule}; {place}")
        items.append(item)
    return items, timestamps


def _read_ids(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file with an id per line") from None


def _print(found: Recommendations, recommender: Recommender, console: Console) -> None:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("", justify="right")
    table.add_column("item")
    titled = bool(recommender.catalogue.titles)
    if titled:
        table.add_column("title")
    table.add_column("events" if found.fallback else "score", justify="right")
    for rank, (item, score) in enumerate(zip(found.items, found.scores, strict=True), 1):
        title = [escape(recommender.catalogue.title(item) or "")] if titled else []
        number = f"{score:,.0f}" if found.fallback else f"{score:.4f}"
        table.add_row(str(rank), escape(item), *title, number)
    console.print(table)
    if found.unknown:
        console.print(f"{found.unknown:,} events left out: the model does not know their items")
    if found.fallback:
        console.print("no known event: these are the most popular items of the training")
