"""The commands: `python -m tim4rec_jax.serving {recommend,batch,export,explain,serve}`.

Each command imports what only it needs when it runs: `serve` needs the extra of the same name.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tim4rec_jax.errors import ArgumentParser, UserError, one_line, run_main
from tim4rec_jax.files import named_file, named_folder, read_regular
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.recommender import Recommendations, Recommender

# Events of --history. A comma separates two events only behind a time, as ids may hold commas.
_HISTORY = re.compile(r".+?@[0-9]+(?:,|$)|.+")
_LARGEST_TEXT = 1 << 30  # bytes
_CSV = "a CSV file with the columns item and timestamp (whole seconds since 1970)"


def main(
    arguments: Sequence[str] | None = None, prog: str = "python -m tim4rec_jax.serving"
) -> int | None:
    """Runs the command line, or the given arguments."""
    parser = ArgumentParser(
        prog=prog,
        description="Recommendations from a run of train.py.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_recommend(commands)
    _add_batch(commands)
    _add_export(commands)
    _add_explain(commands)
    _add_serve(commands)
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:  # argparse would name the help of all commands
        commands.choices[flags.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return flags.run(flags)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--workdir",
        type=named_folder,
        required=True,
        help="directory of a run, as train.py wrote it",
    )
    add("--dataset", type=Path, help="the prepared dataset, if it has moved since the training")


def _add_history_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--history",
        nargs="+",
        metavar="ITEM@TIME,...",
        help="events, oldest first; times in whole seconds since 1970",
    )
    source.add_argument(
        "--event",
        nargs=2,
        action="append",
        metavar=("ITEM", "TIME"),
        help="one event, for ids of any letters; again for each further event",
    )
    source.add_argument("--file", help=f"{_CSV}; - is standard input")


def _add_ranking_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-k", "--top-k", type=int, default=10, metavar="K", help="how many items (default: 10)")
    add("--at", type=int, metavar="TIME", help="when they are shown, for models that know it")
    add("--include-seen", action="store_true", help="items of the history may come again")
    add("--allow", type=Path, metavar="FILE", help="recommend only these items, an id per line")
    add("--deny", type=Path, metavar="FILE", help="never recommend these items, an id per line")
    _add_approximate_flag(parser)


def _add_approximate_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="search an index instead of scoring all items: for catalogues of 100,000 and more "
        "(pip install 'tim4rec-jax[ann]')",
    )


def _add_recommend(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "recommend",
        help="recommend to one history",
        description="Recommends items to one history: --history, --file or standard input.",
    )
    _add_history_flags(parser)
    _add_run_flags(parser)
    _add_ranking_flags(parser)
    parser.add_argument("--sort", action="store_true", help="the events are not in order of time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_recommend)


def _recommend(flags: argparse.Namespace) -> None:
    items, timestamps = _read_history(flags)
    recommender, options = _load(flags)
    found = recommender.recommend(items, timestamps, sort=flags.sort, **options)
    if flags.json:
        values = dataclasses.asdict(found)
        if recommender.catalogue.titles:
            values["titles"] = [recommender.catalogue.title(item) for item in found.items]
        print(json.dumps(values, indent=2))
    else:
        _print_table(found, recommender)


def _print_table(found: Recommendations, recommender: Recommender) -> None:
    table, console = Table(box=SIMPLE_HEAD), Console(highlight=False)
    table.add_column("", justify="right")
    table.add_column("item")
    titled = bool(recommender.catalogue.titles)
    if titled:
        table.add_column("title")
    table.add_column("events" if found.fallback else "score", justify="right")
    for rank, (item, score) in enumerate(zip(found.items, found.scores, strict=True), 1):
        title = [Text(recommender.catalogue.title(item) or "")] if titled else []
        number = f"{score:,.0f}" if found.fallback else f"{score:.4f}"
        table.add_row(str(rank), Text(item), *title, number)
    console.print(table)
    if found.unknown:
        events = f"{found.unknown:,} event{'s' * (found.unknown > 1)}"
        console.out(f"{events} left out, of items that the model does not know")
    if found.fallback:
        console.out("no known event: these are the most popular items of the training")


def _add_batch(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "batch",
        help="recommend to all users of a log",
        description="Reads what `python -m data_prep table` reads, in any order, and writes the "
        "best items of every user: user, rank, item, score, fallback (no event was known: popular "
        "items). Larger than memory.",
    )
    add = parser.add_argument
    add(
        "--events",
        nargs="+",
        required=True,
        metavar="FILE",
        help="CSV, TSV, JSON lines or Parquet, plain or gzip; globs",
    )
    add(
        "--out",
        type=named_file,
        required=True,
        metavar="FILE",
        help="the file to write: CSV if its name ends in .csv, else Parquet",
    )
    _add_run_flags(parser)
    _add_ranking_flags(parser)
    add("--user", metavar="COLUMN", help="who (default: as prepared, or user_id or user)")
    add("--item", metavar="COLUMN", help="what (default: as prepared, or item_id or item)")
    add("--time", "--timestamp", metavar="COLUMN", help="when (default: as prepared, or timestamp)")
    add(
        "--time-unit",
        choices=("s", "ms", "us", "ns", "iso"),
        help="of the times: since 1970, or iso for dates (default: as prepared)",
    )
    add(
        "--on-bad-row",
        choices=("error", "skip"),
        default="error",
        help="stop at a bad row, or leave it out and count it (default: error)",
    )
    add(
        "--on-unknown",
        choices=("skip", "error"),
        default="skip",
        help="what to do about items that the model does not know (default: skip and count)",
    )
    add("--memory-limit", default="2GB", metavar="SIZE", help="for sorting (default: 2GB)")
    parser.set_defaults(run=_batch)


def _batch(flags: argparse.Namespace) -> None:
    from tim4rec_jax.serving.batch_job import Columns, recommend_all

    recommender, options = _load(flags)
    started = perf_counter()
    summary = recommend_all(
        recommender,
        flags.events,
        flags.out,
        Columns(flags.user, flags.item, flags.time, flags.time_unit),
        allow_unknown=flags.on_unknown == "skip",
        on_bad_row=flags.on_bad_row,
        memory_limit=flags.memory_limit,
        **options,
    )
    seconds = perf_counter() - started
    print(
        f"wrote {flags.out}: {summary.rows:,} recommendations to {summary.users:,} users in "
        f"{seconds:,.1f} s ({(summary.users + summary.without) / seconds:,.0f} users/s)"
    )
    if summary.without:
        print(
            f"{summary.without:,} users got none: --allow, --deny and what they have seen leave no "
            "item for them"
        )
    for reason, count in summary.bad_rows.items():
        print(f"skipped {count:,} rows: {reason}")
    if summary.unknown:
        print(f"skipped {summary.unknown:,} events: the model does not know their items")
    if summary.fallback:
        print(
            f"{summary.fallback:,} users had no known event and got the most popular items "
            "(column fallback)"
        )


def _add_export(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a run as StableHLO, weights and vocabulary that need only jax",
        description="Writes a folder that recommends without this package (CPU, CUDA, TPU).",
    )
    _add_run_flags(parser)
    parser.add_argument("--out", type=named_folder, required=True, help="folder to write")
    parser.add_argument(
        "--top-k", type=int, default=100, metavar="K", help="items a call returns (default: 100)"
    )
    parser.set_defaults(run=_export)


def _export(flags: argparse.Namespace) -> None:
    from tim4rec_jax.serving.export import PLATFORMS, export

    if flags.top_k < 1:
        raise UserError(f"--top-k is {flags.top_k}; it must be 1 or more")
    metadata = export(flags.workdir, flags.out, top=flags.top_k, dataset=flags.dataset)
    size = sum(file.stat().st_size for file in flags.out.iterdir())
    print(
        f"wrote {flags.out}: {metadata['items']:,} items, {size / 1e6:.1f} MB, for "
        f"{', '.join(PLATFORMS)}"
    )


def _add_explain(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="draw what the top recommendation for a history rests on",
        description="Draws each event's weight in the top recommendation and the time-aware "
        "mask of every layer and head.",
    )
    _add_run_flags(parser)
    _add_history_flags(parser)
    add = parser.add_argument
    add("--out", type=named_file, required=True, metavar="FILE.png", help="the picture")
    add("--at", type=int, metavar="TIME", help="moment of the prediction, for models that know it")
    parser.set_defaults(run=_explain)


def _explain(flags: argparse.Namespace) -> None:
    from tim4rec_jax.serving.explain import explain
    from tim4rec_jax.serving.picture import draw

    items, timestamps = _read_history(flags)
    enable_compilation_cache()
    recommender = Recommender.load(flags.workdir, dataset=flags.dataset)
    found = explain(recommender, items, timestamps, at=flags.at)
    draw(found, flags.out)
    print(f"top recommendation: {found.titles[0]} (probability {found.probability:.2%})")
    weights = found.weights.tolist()
    for weight, event in sorted(
        zip(weights, found.events, strict=True), key=lambda pair: -abs(pair[0])
    )[:5]:
        print(f"{weight:+.3f}  {event}")
    if found.recommendations.unknown:
        print(f"left out: {found.recommendations.unknown} events with items unknown to the model")
    print(f"wrote {flags.out}")


def _add_serve(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="recommend over HTTP (pip install 'tim4rec-jax[serve]')",
        description="Serves recommendations over HTTP, with a page to try them at /.",
    )
    _add_run_flags(parser)
    add = parser.add_argument
    add(
        "--store",
        metavar="FILE",
        help="keep users in this SQLite file, or in the Redis or Valkey server redis://HOST:PORT, "
        "not in memory",
    )
    add(
        "--state-dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the states that users have in the store; bfloat16 halves them (default: float32)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="callers must send the first line of this file: Authorization: Bearer ...",
    )
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which callers reach the service (repeat it for more; default: names of "
        "this machine for a loopback address, else any name)",
    )
    _add_approximate_flag(parser)
    parser.set_defaults(run=_serve)


def _serve(flags: argparse.Namespace) -> None:
    try:
        from tim4rec_jax.serving.http.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "httptools", "uvicorn", "prometheus_client"):
            raise
        raise UserError(
            f"{error.name} is not installed; pip install 'tim4rec-jax[serve]'"
        ) from error
    if not 0 <= flags.port < 1 << 16:
        raise UserError(f"--port is {flags.port}; ports go from 0 to 65535")
    serve(
        flags.workdir,
        dataset=flags.dataset,
        store=flags.store,
        host=flags.host,
        port=flags.port,
        approximate=flags.approximate,
        state_dtype=flags.state_dtype,
        token_file=flags.token_file,
        allowed_hosts=flags.allowed_host,
    )


def _load(flags: argparse.Namespace) -> tuple[Recommender, dict[str, Any]]:
    """The recommender, and the arguments of its methods, that the flags name."""
    options = {
        "k": flags.top_k,
        "at": flags.at,
        "exclude_seen": not flags.include_seen,
        "allow": _read_ids(flags.allow),
        "deny": _read_ids(flags.deny),
    }
    enable_compilation_cache()
    recommender = Recommender.load(
        flags.workdir, dataset=flags.dataset, approximate=flags.approximate
    )
    for name in ("allow", "deny"):
        _tell_unknown(name, options[name], recommender.catalogue)
    return recommender, options


def _tell_unknown(name: str, ids: list[str] | None, catalogue: Catalogue) -> None:
    """Says which ids of a filter the model does not know, as one wrongly written does nothing.

    Raises:
        UserError: it knows none of those that alone may be recommended.
    """
    if not ids:
        return
    unknown = [one for one, index in zip(ids, catalogue.indices(ids), strict=True) if not index]
    if unknown:
        told = f"{len(unknown):,} of the {len(ids):,} ids of --{name} are not known to the model, "
        told += f"the first is {one_line(unknown[0], 60)!r}"
        if name == "allow" and len(unknown) == len(ids):
            raise UserError(f"{told}; write one id per line, as in the log")
        print(f"note: {told}", file=sys.stderr)


def _read_ids(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    lines = _read_text(path, "a text file with an id per line").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _read_text(path: Path, kind: str) -> str:
    """The text of a file, which is no pipe or device without end, without the mark at its start."""
    try:
        return read_regular(path, _LARGEST_TEXT).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; name {kind}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read ({reason}); name {kind}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text; name {kind}") from None


def _read_history(flags: argparse.Namespace) -> tuple[list[str], list[int]]:
    """The items and times of `--history`, of `--file` or of standard input."""
    rule = "times are whole seconds since 1970"
    if flags.event:
        where = [f"{' '.join(event)!r} has another time" for event in flags.event]
        return _parse_events(map(tuple, flags.event), f"--event takes ITEM TIME, {rule}", where)
    if flags.history:
        events = [event for text in flags.history for event in _HISTORY.findall(text)]
        pairs = (event.removesuffix(",").rpartition("@")[::2] for event in events)
        return _parse_events(
            pairs,
            f"--history takes ITEM@TIME, {rule}",
            [f"{event!r} is not" for event in events],
        )
    if flags.file is None and sys.stdin.isatty():
        raise UserError(
            "name a history: --history ITEM@TIME,ITEM@TIME, --event ITEM TIME or --file history.csv"
        )
    if flags.file in (None, "-"):
        return _read_csv(sys.stdin, "standard input")
    text = _read_text(Path(flags.file), _CSV)
    return _read_csv(io.StringIO(text, newline=""), flags.file)


def _read_csv(file: Iterable[str], name: str) -> tuple[list[str], list[int]]:
    csv.field_size_limit(sys.maxsize)
    try:
        lines = iter(file)
        # The mark of UTF-8 at the start, which standard input keeps, is no part of a name.
        first = next(lines, "").removeprefix("\ufeff")
        reader = csv.DictReader(itertools.chain([first], lines))
        if not {"item", "timestamp"} <= set(reader.fieldnames or ()):
            raise UserError(f"{name} is not {_CSV}")
        rows = [(reader.line_num, row["item"], row["timestamp"]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name} is not {_CSV}: {error}") from None
    return _parse_events(
        ((item, time) for _, item, time in rows),
        f"{name} must have an item and a time in whole seconds since 1970 in every line",
        [f"line {number} has not" for number, _, _ in rows],
    )


def _parse_events(
    pairs: Iterable[tuple[Any, Any]], rule: str, where: list[str]
) -> tuple[list[str], list[int]]:
    """Items and whole times; an error quotes the rule, and says where it is broken."""
    items, timestamps = [], []
    for (item, time), place in zip(pairs, where, strict=True):
        if not item or not re.fullmatch("-?[0-9]{1,30}", (time or "").strip()):
            raise UserError(f"{rule}; {place}")
        items.append(item)
        timestamps.append(int(time))
    return items, timestamps


if __name__ == "__main__":
    sys.exit(run_main(main))
