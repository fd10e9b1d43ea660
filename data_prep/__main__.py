"""`python -m data_prep`: the command line."""

import argparse
import datetime
import os
import sys
from pathlib import Path

import duckdb
from rich.console import Console

from data_prep import writer
from data_prep.prepare import prepare, print_steps
from data_prep.sources import MD5, SOURCES
from tim4rec_jax.errors import UserError, run_main

_EXAMPLES = """examples:
  python -m data_prep movielens ml-1m --out data/ml-1m --order recbole
  python -m data_prep movielens --source ~/Downloads/ml-25m.zip --out data/ml-25m
  python -m data_prep table 'logs/*.csv.gz' --user uid --item sku --time ms --time-unit ms --out data/shop
  python -m data_prep recbole --source ml-100k.inter --order recbole --out data/ml-100k
  python -m data_prep inspect data/ml-1m

`python -m data_prep NAME --help` tells what NAME reads."""
_FORMATTER = argparse.RawDescriptionHelpFormatter


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Turns event logs (who, what, when) into datasets to train on.",
        epilog=_EXAMPLES,
        formatter_class=_FORMATTER,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    output = _output_flags()
    reading = _reading_flags()

    movielens = commands.add_parser(
        "movielens",
        parents=[reading, output],
        formatter_class=_FORMATTER,
        help="MovieLens ratings (ml-100k, 1m, 10m, 20m, 25m, 32m)",
        description="Reads u.data, ratings.dat or ratings.csv, a folder or the zip with it.",
    )
    movielens.add_argument(
        "edition",
        nargs="?",
        choices=[file.removesuffix(".zip") for file in MD5 if file.startswith("ml-")],
        help="what to download where there is no --source",
    )
    amazon = commands.add_parser(
        "amazon",
        parents=[reading, output],
        formatter_class=_FORMATTER,
        help="Amazon reviews or ratings of 2014, 2018 and 2023",
        description="Reads ratings (csv) and reviews (json, jsonl) of all three editions.",
    )
    amazon.add_argument(
        "category", nargs="?", help="what to download where there is no --source, e.g. Beauty"
    )
    amazon.add_argument(
        "--edition", choices=["2014", "2018", "2023"], default="2014", help="default: 2014"
    )
    kuairand = commands.add_parser(
        "kuairand",
        parents=[reading, output],
        formatter_class=_FORMATTER,
        help="KuaiRand short-video logs (Pure, 1K, 27K)",
        description="Reads logs (csv or parquet). Of a folder or an archive: the log of 8 to 21 "
        "April 2022 under the standard policy, which is what the papers use; pass other "
        "files by name.",
    )
    kuairand.add_argument(
        "edition",
        nargs="?",
        choices=["Pure", "1K", "27K"],
        help="what to download where there is no --source",
    )
    kuairand.add_argument(
        "--where",
        metavar="SQL",
        default="is_rand = 0",
        help="rows to keep, as a condition on the log's columns (default: %(default)s)",
    )
    commands.add_parser(
        "steam",
        parents=[reading, output],
        formatter_class=_FORMATTER,
        help="Steam reviews (the original, or RecBole's .inter)",
        description="Reads steam_reviews.json.gz as its owner publishes it, or RecBole's .inter.",
    )
    recbole = commands.add_parser(
        "recbole",
        parents=[reading, output],
        formatter_class=_FORMATTER,
        help="any RecBole .inter file",
        description="Reads a file with RecBole's typed header (user_id:token item_id:token ...).",
    )
    table = commands.add_parser(
        "table",
        parents=[reading, output],
        formatter_class=_FORMATTER,
        help="your own log: CSV, TSV, JSON lines or Parquet, plain or gzip",
        description="Reads any table of events. The format is found out by looking into the file.",
    )
    table.add_argument(
        "--columns",
        metavar="A,B,C",
        help="names of all columns of a file that has no header line",
    )
    for command in (recbole, table):
        command.add_argument("files", nargs="*", help="files or globs (or --source)")
        command.add_argument("--user", default="user_id", metavar="COLUMN", help="who")
        command.add_argument("--item", default="item_id", metavar="COLUMN", help="what")
        command.add_argument("--time", default="timestamp", metavar="COLUMN", help="when")
        command.add_argument("--rating", default="rating", metavar="COLUMN", help="how good")
        command.add_argument(
            "--time-unit",
            choices=["s", "ms", "us", "ns", "iso"],
            default="s",
            help="of the time column: since 1970, or iso for dates (default: s)",
        )
        command.add_argument("--delimiter", metavar="TEXT", help="between fields (default: guess)")
        command.add_argument(
            "--where", metavar="SQL", help="rows to keep, e.g. \"event = 'purchase'\""
        )
    return parser


def _output_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new dataset")
    flags.add_argument("--name", help="its name (default: that of DIR)")
    flags.add_argument("--overwrite", action="store_true", help="replace the dataset in DIR")
    return flags


def _reading_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument(
        "--source", nargs="+", metavar="PATH", help="file, folder, archive or glob to read"
    )
    flags.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tim4rec-jax",
        help="where downloads are kept (default: %(default)s)",
    )
    protocol = flags.add_argument_group("what to keep, in this order")
    protocol.add_argument(
        "--on-bad-row",
        choices=["error", "skip"],
        default="error",
        help="stop at a bad row, or leave it out and count it (default: error)",
    )
    protocol.add_argument(
        "--deduplicate",
        choices=["exact", "first", "last"],
        help="keep one of the events with the same user, item and time (exact), or the first or "
        "last event of each user and item (default: keep all)",
    )
    protocol.add_argument("--min-rating", type=float, metavar="X", help="lowest rating kept")
    protocol.add_argument("--since", type=_date, metavar="DATE", help="first moment kept (UTC)")
    protocol.add_argument("--until", type=_date, metavar="DATE", help="first one not kept (UTC)")
    protocol.add_argument(
        "--k-core",
        type=int,
        default=5,
        metavar="K",
        help="drop users and items with fewer than K events until none is left (default: 5; "
        "1 keeps all)",
    )
    protocol.add_argument(
        "--order",
        choices=["exact", "recbole"],
        default="exact",
        help="sort events by their exact time, or as RecBole does by time rounded to 32-bit "
        "floats, which the published numbers of most models stand on (default: exact)",
    )
    machine = flags.add_argument_group("resources")
    machine.add_argument("--memory-limit", metavar="SIZE", help="e.g. 4GB (default: 80%% of all)")
    machine.add_argument(
        "--shard-events",
        type=int,
        default=16_000_000,
        metavar="N",
        help="events per sequences file (default: %(default)s)",
    )
    return flags


def _date(value: str) -> datetime.datetime:
    moment = datetime.datetime.fromisoformat(value)
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _prepare(flags: argparse.Namespace, console: Console) -> None:
    source = SOURCES[flags.command]
    flags.name = flags.name or flags.out.absolute().name
    with writer.staging(flags.out, overwrite=flags.overwrite) as work:
        inputs = (flags.source or []) + getattr(flags, "files", [])
        if not inputs:
            raise UserError("pass --source")
        metadata = prepare(source, flags, inputs, work, console)
    print_steps(metadata, console)
    console.print(f"wrote {flags.out}")


def main() -> None:
    """Runs the command line."""
    flags = _parser().parse_args()
    try:
        _prepare(flags, Console())
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise UserError(str(error).splitlines()[0]) from error


if __name__ == "__main__":
    sys.exit(run_main(main))
