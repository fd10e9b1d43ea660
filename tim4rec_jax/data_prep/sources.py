"""The families of source files: their columns, their titles, their owners and checksums."""

import argparse
import csv
import dataclasses
import io
import itertools
import json
import sys
import urllib.parse
from collections.abc import Callable

from tim4rec_jax.data_prep.files import (
    GZIP_ERRORS,
    SourceFile,
    damaged_gzip,
    first_line,
    open_bytes,
    open_text,
)
from tim4rec_jax.data_prep.layout import Kind, Layout, column_names, guess_delimiter, sniff
from tim4rec_jax.errors import UserError

Flags = argparse.Namespace

_AMAZON = {
    "2014": "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_{}.csv",
    "2018": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/categoryFilesSmall/{}.csv",
    "2023": "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/benchmark/0core/"
    "rating_only/{}.csv.gz",
}
_NO_HEADER = ("user", "item", "time", "rating")  # our names for files without names
# Checksums as the owners publish them: GroupLens beside each file, KuaiRand on its Zenodo page.
# The owners of the other files publish none.
MD5 = {
    "ml-100k.zip": "0e33842e24a9c977be4e0107933c0723",
    "ml-1m.zip": "c4d9eecfca2ab87c1945afe126590906",
    "ml-10m.zip": "ce571fd55effeba0271552578f2648bd",
    "ml-20m.zip": "cd245b17a1ae2cc31bb14903e1204af3",
    "ml-25m.zip": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-32m.zip": "d472be332d4daa821edc399621853b57",
    "KuaiRand-Pure.tar.gz": "0820331067a3784d9691136f772b35a7",
    "KuaiRand-1K.tar.gz": "6b0b9c8222d67fcd4c676218edca3f1f",
    "KuaiRand-27K.tar.gz": "3e3c799a24e2d23a4d2c757fbf9adf59",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A family of data sets.

    Attributes:
      layout: returns how to read one of its files, given the flags of the command.
      url: returns the address at the owner for the flags; None if there is no download.
      members: the files to take from a folder or an archive (see `files.find_files`).
      titles: the files with titles of items, named like `members`.
    """

    layout: Callable[[SourceFile, Flags], Layout]
    url: Callable[[Flags], str] | None = None
    members: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()


def _movielens(file: SourceFile, flags: Flags) -> Layout:
    line = first_line(file)
    if line.lower().startswith("userid,"):
        columns = column_names(file, "csv", ",")
        return Layout("csv", columns, "userId", "movieId", "timestamp", "rating", header=True)
    delimiter = "::" if "::" in line else "\t"
    if line.count(delimiter) != 3:
        raise UserError(
            f"{file}, line 1: not a MovieLens ratings file (u.data, ratings.dat or ratings.csv); "
            "read other files with `python -m data_prep table`"
        )
    columns = ("user", "item", "rating", "time")
    return Layout("split", columns, *_NO_HEADER, delimiter=delimiter)


def _amazon(file: SourceFile, flags: Flags) -> Layout:
    kind = sniff(file)
    columns = column_names(file, kind, ",")
    if "reviewerID" in columns:  # reviews of 2014 and 2018
        return Layout(kind, columns, "reviewerID", "asin", "unixReviewTime", "overall")
    if kind != "csv" or "parent_asin" in columns:  # 2023
        ids = ("user_id", "parent_asin", "timestamp", "rating")
        return Layout(kind, columns, *ids, time_unit="ms", header=kind == "csv")
    order = ("user", "item") if _edition(file, flags) == "2014" else ("item", "user")
    return Layout("csv", (*order, "rating", "time"), *_NO_HEADER)


def _edition(file: SourceFile, flags: Flags) -> str:
    """Finds the edition of a file without names.

    The columns are user, item in 2014 and item, user in 2018. Every item id has ten characters.
    """
    csv.field_size_limit(sys.maxsize)
    with open_text(file.path) as lines:
        try:
            rows = [row for row in itertools.islice(csv.reader(lines), 1000) if len(row) >= 2]
        except (csv.Error, *GZIP_ERRORS):
            return flags.edition  # reading it says what is wrong
    first, second = (all(len(row[column]) == 10 for row in rows) for column in (0, 1))
    if first == second:
        return flags.edition
    return "2018" if first else "2014"


def _kuairand(file: SourceFile, flags: Flags) -> Layout:
    kind = sniff(file)
    ids = ("user_id", "video_id", "time_ms")
    columns = column_names(file, kind, ",")
    return Layout(kind, columns, *ids, time_unit="ms", header=True, where=flags.where)


def _steam(file: SourceFile, flags: Flags) -> Layout:
    line = first_line(file)
    if line.startswith("{"):
        ids = ("username", "product_id", "date")
        return Layout("json" if _is_json(line) else "literal", ids, *ids, time_unit="iso")
    columns = _typed_header(file, "\t")
    item = "product_id" if "product_id" in columns else "item_id"
    time = "timestamp" if "timestamp" in columns else "date"
    layout = Layout("split", columns, "user_id", item, time, delimiter="\t", header=True)
    with open_text(file.path) as lines:
        try:
            second = next(itertools.islice(lines, 1, 2), "").rstrip("\r\n")
        except GZIP_ERRORS as error:
            raise damaged_gzip(file) from error
    values = dict(zip(columns, second.split("\t"), strict=False))
    is_date = "-" in values.get(time, "")
    return dataclasses.replace(layout, time_unit="iso") if is_date else layout


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _recbole(file: SourceFile, flags: Flags) -> Layout:
    columns = _typed_header(file, flags.delimiter or "\t")
    return _chosen("split", columns, flags, flags.delimiter or "\t", header=True)


def _typed_header(file: SourceFile, delimiter: str) -> tuple[str, ...]:
    fields = first_line(file).split(delimiter)
    if not all(":" in field for field in fields):
        raise UserError(
            f"{file}, line 1: not a RecBole header (user_id:token, item_id:token, ...); read "
            "other files with `python -m data_prep table`"
        )
    return tuple(field.rsplit(":", 1)[0] for field in fields)


def _table(file: SourceFile, flags: Flags) -> Layout:
    kind = sniff(file)
    delimiter = ""
    if kind == "csv":
        delimiter = flags.delimiter or guess_delimiter(file)
        kind = "split" if len(delimiter) > 1 else "csv"
    given = tuple(flags.columns.split(",")) if flags.columns else None
    if given and kind not in ("csv", "split"):
        raise UserError(f"{file} names its columns itself; leave out --columns")
    columns = given or column_names(file, kind, delimiter)
    header = given is None and kind in ("csv", "split")
    return _chosen(kind, columns, flags, delimiter, header=header)


def _chosen(
    kind: Kind, columns: tuple[str, ...], flags: Flags, delimiter: str, *, header: bool
) -> Layout:
    """Returns a layout with the columns that the flags name."""
    return Layout(
        kind,
        columns,
        flags.user,
        flags.item,
        flags.time,
        flags.rating,
        time_unit=flags.time_unit,
        delimiter=delimiter,
        header=header,
        where=flags.where,
    )


def read_titles(files: list[SourceFile]) -> dict[str, str]:
    """Reads the lists of movies of MovieLens.

    Args:
      files: `u.item`, `movies.dat` or `movies.csv`; plain or gzip; UTF-8 or else Latin-1.

    Returns:
      The title of each original item id.

    Raises:
      UserError: a file is damaged.
    """
    found: dict[str, str] = {}
    csv.field_size_limit(sys.maxsize)
    for file in files:
        try:
            with open_bytes(file.path) as content:
                raw = content.read()
            text = _decoded(raw)
            if "movies.csv" in file.name:
                rows = csv.reader(io.StringIO(text, newline=""))
                next(rows, None)
            else:
                delimiter = "::" if "movies.dat" in file.name else "|"
                rows = (line.split(delimiter) for line in text.splitlines())
            found |= {row[0]: row[1] for row in rows if len(row) > 1}
        except GZIP_ERRORS as error:
            raise damaged_gzip(file) from error
        except csv.Error as error:
            raise UserError(f"{file} holds no titles ({error}); correct or remove it") from error
    return found


def _decoded(raw: bytes) -> str:
    # The older editions are in Latin-1 and the later ones in UTF-8.
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


SOURCES = {
    "movielens": Source(
        _movielens,
        lambda flags: f"https://files.grouplens.org/datasets/movielens/{flags.edition}.zip",
        ("u.data", "ratings.dat", "ratings.csv"),
        ("u.item", "movies.dat", "movies.csv"),
    ),
    "amazon": Source(
        _amazon,
        lambda flags: _AMAZON[flags.edition].format(urllib.parse.quote(flags.category, "")),
        ("ratings_*.csv", "reviews_*.json", "*.jsonl|*.json|*.csv"),
    ),
    "kuairand": Source(
        _kuairand,
        lambda flags: f"https://zenodo.org/records/10439422/files/KuaiRand-{flags.edition}.tar.gz",
        ("log_standard_4_08_to_4_21_*.csv", "log_*.csv|*.parquet"),
    ),
    "steam": Source(
        _steam,
        lambda flags: "https://cseweb.ucsd.edu/~wckang/steam_reviews.json.gz",
        ("*.inter", "steam_reviews.json", "*.json"),
    ),
    "recbole": Source(_recbole, members=("*.inter",)),
    "table": Source(_table, members=("*.parquet|*.pq|*.csv|*.tsv|*.jsonl|*.ndjson|*.json",)),
}
