"""The command line's flags and their help."""

import argparse
import datetime
import itertools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from tim4rec_jax.data_prep.read import NUMBER
from tim4rec_jax.data_prep.sources import MD5
from tim4rec_jax.data_prep.writer import SHARD_EVENTS
from tim4rec_jax.errors import ArgumentParser, one_line
from tim4rec_jax.files import named_folder

_DESCRIPTION = """\
Turns event logs (who, what, when) into datasets that `train.py` reads.

Each NAME reads one kind of source; `%(prog)s NAME --help` tells its flags."""
_EXAMPLES = """\
examples:
  %(prog)s synthetic --out data/synthetic
  %(prog)s movielens ml-1m --out data/ml-1m --order recbole
  %(prog)s table 'logs/*.csv.gz' --user uid --item sku --time at --time-unit ms \\
      --out data/shop
  %(prog)s inspect data/shop"""


# DuckDB takes long to find out that one of a thousand brackets is not closed.
_DEEPEST = 100


def parser(prog: str = "python -m data_prep") -> ArgumentParser:
    """Builds the parser; `command` of its result is the name of a source, inspect or synthetic.

    Args:
      prog: what the command is called.
    """
    top = ArgumentParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="NAME")
    _public_sources(commands)
    _own_tables(commands)
    _others(commands)
    return top


def _public_sources(commands) -> None:
    movielens = _reader(
        commands,
        "movielens",
        "MovieLens ratings: ml-100k, 1m, 10m, 20m, 25m, 32m",
        "Reads u.data, ratings.dat or ratings.csv: the file, its folder or the zip as downloaded.",
        "ml-1m --order recbole --out data/ml-1m",
        "--source ~/Downloads/ml-25m.zip --min-rating 4 --out data/ml-25m",
    )
    movielens.add_argument(
        "edition",
        nargs="?",
        choices=[file.removesuffix(".zip") for file in MD5 if file.startswith("ml-")],
        help="what to download if there is no --source",
    )
    amazon = _reader(
        commands,
        "amazon",
        "Amazon ratings and reviews of 2014, 2018, 2023",
        "Reads ratings (csv) and reviews (json, jsonl); the edition is found out by looking.",
        "Beauty --order recbole --out data/beauty",
        "--source reviews_Beauty_5.json.gz --out data/beauty",
    )
    amazon.add_argument(
        "category", nargs="?", help="what to download if there is no --source, e.g. Beauty"
    )
    amazon.add_argument(
        "--edition", choices=["2014", "2018", "2023"], default="2014", help="default: 2014"
    )
    kuairand = _reader(
        commands,
        "kuairand",
        "KuaiRand short-video logs: Pure, 1K, 27K",
        "Reads logs (csv, parquet). Of a folder or an archive: the standard policy's log of 8 to "
        "21 April 2022, as in the papers; name other files to read those.",
        "Pure --order recbole --out data/kuairand",
        "--source 'KuaiRand-1K/data/log_standard_*.csv' --out data/kuairand-1k",
    )
    kuairand.add_argument(
        "edition",
        nargs="?",
        choices=["Pure", "1K", "27K"],
        help="what to download if there is no --source",
    )
    _where(kuairand, "is_rand = 0")
    _reader(
        commands,
        "steam",
        "Steam reviews: the original or RecBole's",
        "Reads steam_reviews.json.gz as its owner publishes it, or RecBole's steam.inter.",
        "--source steam_reviews.json.gz --out data/steam",
    )


def _own_tables(commands) -> None:
    recbole = _reader(
        commands,
        "recbole",
        "any RecBole .inter file",
        "Reads a file with a typed header: user_id:token item_id:token timestamp:float ...",
        "--source ml-100k.inter --order recbole --out data/ml-100k",
    )
    table = _reader(
        commands,
        "table",
        "your own log: CSV, TSV, JSON lines, Parquet",
        "Reads a table of events, plain or gzip; its format is found out by looking into it.",
        "events.parquet --user customer --item sku --time at --time-unit iso --out data/shop",
        "--source 'logs/*.csv.gz' --where \"event = 'buy'\" --out data/shop",
    )
    table.add_argument(
        "--columns", metavar="A,B,C", help="names of all columns, if no first line holds them"
    )
    for command in (recbole, table):
        command.add_argument("files", nargs="*", metavar="PATH", help="same as --source")
        for column, default, meaning in (
            ("user", "user_id", "who"),
            ("item", "item_id", "what"),
            ("time", "timestamp", "when"),
            ("rating", "rating", "how good, for --min-rating"),
        ):
            command.add_argument(
                f"--{column}",
                metavar="COLUMN",
                default=default,
                help=f"{meaning} (default: %(default)s)",
            )
        command.add_argument(
            "--time-unit",
            choices=["s", "ms", "us", "ns", "iso"],
            default="s",
            help="of the times: since 1970, or iso for dates (default: s)",
        )
        command.add_argument(
            "--delimiter",
            metavar="TEXT",
            type=_delimiter,
            help="between fields (default: found out by looking)",
        )
        _where(command, None)


def _others(commands) -> None:
    synthetic = commands.add_parser(
        "synthetic",
        help="made-up events whose best possible scores are known",
        description="Makes events in which the time matters by a known amount, and tells the best "
        "scores that any model and any model blind to time could reach.",
    )
    _output(synthetic)
    for name, default in (("users", 4000), ("items", 300), ("seed", 0)):
        synthetic.add_argument(
            f"--{name}",
            type=_whole(0, 10**18),
            metavar="N",
            default=default,
            help="default: %(default)s",
        )
    synthetic.add_argument(
        "--effect",
        type=_share,
        metavar="X",
        default=1.0,
        help="of time, from 0, where it says nothing, to 1, where it says most (default: 1)",
    )
    inspect = commands.add_parser(
        "inspect",
        help="what is in a prepared dataset",
        description="Prints a dataset's figures and draws them.",
    )
    inspect.add_argument("directory", type=named_folder, metavar="DIR", help="a prepared dataset")
    inspect.add_argument(
        "--plot", type=named_folder, metavar="PNG", help="the picture (default: DIR/inspect.png)"
    )


def _reader(commands, name: str, short: str, long: str, *examples: str) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=short,
        description=long,
        epilog="\n  ".join(["examples:", *(f"%(prog)s {line}" for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--source", nargs="+", metavar="PATH", help="file, folder, archive, glob")
    _output(command)
    _protocol(command.add_argument_group("what to keep, step by step, and its order"))
    _features(command.add_argument_group("features of items, from a table of items"))
    machine = command.add_argument_group("resources")
    machine.add_argument(
        "--engine",
        choices=["duckdb", "spark"],
        default="duckdb",
        help="what filters and sorts: DuckDB on this machine, or Spark on many, whose settings are "
        "read as spark-submit reads them; the result is the same (default: duckdb)",
    )
    machine.add_argument(
        "--memory-limit",
        metavar="SIZE",
        help="of DuckDB, e.g. 4GB (default: 80 %% of all); with Spark, of each task that reads a "
        "file (default: 1GB)",
    )
    machine.add_argument(
        "--shard-events",
        type=_whole(1, 2 * 10**9),
        default=SHARD_EVENTS,
        metavar="N",
        help="start another sequences file after N events (default: %(default)s)",
    )
    machine.add_argument(
        "--cache",
        type=named_folder,
        metavar="DIR",
        default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tim4rec-jax",
        help="where downloads are kept (default: %(default)s)",
    )
    return command


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=named_folder, required=True, metavar="DIR", help="the new dataset"
    )
    command.add_argument("--name", help="the dataset's name (default: that of DIR)")
    command.add_argument("--overwrite", action="store_true", help="replace the dataset in DIR")


def _where(command: argparse.ArgumentParser, default: str | None) -> None:
    command.add_argument(
        "--where",
        metavar="SQL",
        type=_condition,
        default=default,
        help=f"condition on the source's columns (default: {default or 'none'})",
    )


def _protocol(group) -> None:
    group.add_argument(
        "--on-bad-row",
        choices=["error", "skip"],
        default="error",
        help="stop at a bad row, or leave it out and count it (default: error)",
    )
    group.add_argument(
        "--deduplicate",
        choices=["exact", "first", "last"],
        help="keep one event of the same user, item and time (exact), or the first or last of "
        "each user and item (default: keep all)",
    )
    group.add_argument("--min-rating", type=_number, metavar="X", help="lowest rating to keep")
    group.add_argument("--since", type=_date, metavar="DATE", help="first moment to keep (UTC)")
    group.add_argument("--until", type=_date, metavar="DATE", help="first moment to drop (UTC)")
    group.add_argument(
        "--k-core",
        type=_whole(1, 10**18),
        default=5,
        metavar="K",
        help="drop users and items with fewer than K events, again and again until all have K "
        "(default: 5; 1 keeps all)",
    )
    group.add_argument(
        "--order",
        choices=["exact", "recbole"],
        default="exact",
        help="sort a user's events by time, or as RecBole does, by time rounded to 32 bits: most "
        "published numbers, the paper's too, stand on that (default: exact)",
    )
    group.add_argument(
        "--stable-ids",
        action="store_true",
        help="number users and items in the order of their ids, so that the numbers do not depend "
        "on the order of the rows (default: in the order in which they appear)",
    )


def _features(group) -> None:
    group.add_argument(
        "--item-features",
        nargs="+",
        metavar="PATH",
        help="a table with a row for each item: its id, under the name that it has in the log "
        "(item_id for sources that are no tables), and a column for each feature",
    )
    group.add_argument(
        "--item-title",
        metavar="COLUMN",
        help="the column with titles, which are shown beside the ids and are no feature",
    )
    group.add_argument(
        "--feature-columns", type=_names, metavar="A,B", help="the columns to use (default: all)"
    )
    group.add_argument(
        "--dense-features",
        type=_names,
        metavar="A,B",
        default=(),
        help="columns whose whole numbers are amounts, and not names of something",
    )
    group.add_argument(
        "--feature-separator",
        metavar="TEXT",
        help="what stands between several values in one field (default: a field is one value)",
    )
    group.add_argument(
        "--feature-min-count",
        type=_whole(1, 10**9),
        metavar="N",
        default=2,
        help="values that fewer items have count as unknown (default: %(default)s)",
    )
    group.add_argument(
        "--keep-items",
        action="store_true",
        help="items of the table that have no events, or too few, are in the catalogue too, so "
        "that their features alone can recommend them",
    )


def _names(value: str) -> tuple[str, ...]:
    return tuple(value.split(","))


def _whole(least: int, most: int) -> Callable[[str], int]:
    """Returns a function that reads a whole number between two others, of ASCII digits only."""

    def whole(value: str) -> int:
        if not re.fullmatch("[0-9]{1,30}", value) or not least <= int(value) <= most:
            limit = f"{most:,}" if most < 10**18 else "10**18"
            raise argparse.ArgumentTypeError(
                f"{one_line(value, 40)!r} is no whole number from {least} to {limit}"
            )
        return int(value)

    return whole


def _condition(value: str) -> str:
    depths = itertools.accumulate((letter in "([{") - (letter in ")]}") for letter in value)
    if max(depths, default=0) > _DEEPEST:
        raise argparse.ArgumentTypeError(
            f"{one_line(value, 40)!r} has more than {_DEEPEST} brackets inside each other"
        )
    return value


def _share(value: str) -> float:
    number = _number(value)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return number


def _number(value: str) -> float:
    if not re.fullmatch(NUMBER, value) or not math.isfinite(float(value)):
        raise argparse.ArgumentTypeError(f"{one_line(value, 40)!r} is no number such as 3.5")
    return float(value)


def _delimiter(value: str) -> str:
    value = value.replace("\\t", "\t")
    if any(letter in value for letter in '"\r\n\0'):
        raise argparse.ArgumentTypeError(
            f"{one_line(value, 40)!r} is no delimiter: quotes, line ends and null bytes cannot be"
        )
    return value


def _date(value: str) -> datetime.datetime:
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{one_line(value, 40)!r} is no date such as 2019-12-31"
        ) from error
    if not 1970 <= moment.year <= 2261:
        raise argparse.ArgumentTypeError(f"{value!r} is not between the years 1970 and 2261")
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
