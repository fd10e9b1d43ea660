"""What a source file looks like: its format, its columns, and which of them hold what."""

import csv
import dataclasses
import difflib
import json
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.text import first_line
from tim4rec_jax.errors import UserError

Kind = Literal["csv", "split", "json", "literal", "parquet"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a file is written and which of its columns hold what.

    Attributes:
      kind: `csv` (quotes allowed), `split` (one event a line, cut at `delimiter`, no quotes),
        `json` (one object a line), `literal` (one Python dictionary a line) or `parquet`.
      columns: names of all columns; for `json` and `literal` the keys that are looked at.
      user: column of the user id; `item`, `time` and `rating` likewise.
      time_unit: `s`, `ms`, `us`, `ns` since 1970, or `iso`: dates, UTC where no zone is given.
      delimiter: what parts the fields of `csv` and `split`.
      header: whether the first line of `csv` and `split` holds names.
      where: SQL condition on the columns; rows that fail it are left out unchecked.
    """

    kind: Kind
    columns: tuple[str, ...]
    user: str
    item: str
    time: str
    rating: str | None = None
    time_unit: str = "s"
    delimiter: str = ","
    header: bool = False
    where: str | None = None


def sniff(path: Path) -> Kind:
    """Tells Parquet, JSON lines and delimited text apart by content, not by name.

    Raises:
      UserError: the file is empty, a damaged gzip file or one JSON array.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    start = first_line(path).lstrip()[:1]
    if start == "[":
        raise UserError(f"{path} is one JSON array; write one object a line (`jq -c '.[]'`)")
    return "json" if start == "{" else "csv"


def column_names(path: Path, kind: Kind, delimiter: str) -> tuple[str, ...]:
    """Returns the column names that a Parquet file, a header line or a first JSON object holds.

    Raises:
      UserError: the file is damaged, or its first line holds no names.
    """
    if kind == "parquet":
        try:
            return tuple(pq.read_schema(path).names)
        except pa.ArrowException as error:
            raise UserError(
                f"{path} is a damaged Parquet file ({error}); fetch it again"
            ) from error
    line = first_line(path)
    if kind == "json":
        try:
            return tuple(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{path}, line 1: not valid JSON ({error}); correct the line"
            ) from error
    if kind == "split":
        return tuple(line.split(delimiter))
    found = next(csv.reader([line], delimiter=delimiter))
    return tuple(column or f"column {number}" for number, column in enumerate(found, 1))


def guess_delimiter(path: Path) -> str:
    """Returns whichever of tab, comma, semicolon and bar the first line has most of."""
    line = first_line(path)
    return max("\t,;|", key=line.count)


def check_columns(path: Path, layout: Layout, remedy: str) -> None:
    """Checks that a file has the columns that its layout names.

    Args:
      path: the file, for the message.
      layout: its layout.
      remedy: what to do about a missing column.

    Raises:
      UserError: names the column that is missing, the nearest one and the remedy.
    """
    columns = layout.columns
    for number, column in enumerate(columns):
        if column in columns[:number]:
            raise UserError(f"{path}: two columns are called {column!r}; rename one of them")
    for column in (layout.user, layout.item, layout.time, layout.rating):
        if column is not None and column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"{path}, line 1: no column {column!r}{hint}, there are {', '.join(columns)}; "
                f"{remedy}"
            )
