"""Describes a source file: its format, its columns and their meaning."""

import csv
import dataclasses
import difflib
import json
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data_prep.files import first_line
from tim4rec_jax.errors import UserError

Kind = Literal["csv", "split", "json", "literal", "parquet"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The format of a file and the meaning of its columns.

    Attributes:
      kind: `csv` (quotes allowed), `split` (one event in each line, cut at `delimiter`, no
        quotes), `json` (one object in each line), `literal` (one Python dictionary in each line)
        or `parquet`.
      columns: names of all columns; for `json` and `literal` the keys that are read.
      user: name of the column with the user id.
      item: name of the column with the item id.
      time: name of the column with the time.
      rating: name of the column with the rating; None if there is none.
      time_unit: `s`, `ms`, `us` or `ns` since 1970, or `iso` for dates, in UTC if they name no
        zone.
      delimiter: text between the fields of `csv` and `split`.
      header: whether the first line of `csv` and `split` holds names.
      where: SQL condition on the columns. Rows that fail it are left out and not checked.
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
    """Returns the column names of a Parquet file, a header line or a first JSON object.

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
    """Returns tab, comma, semicolon or bar, whichever is most frequent in the first line."""
    line = first_line(path)
    return max("\t,;|", key=line.count)


def check_columns(path: Path, layout: Layout, remedy: str) -> None:
    """Checks that a file has the columns that its layout names.

    Args:
      path: the file, for the message.
      layout: its layout.
      remedy: what the user can do about a missing column.

    Raises:
      UserError: a column is missing. The message names it, the most similar one and the remedy.
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
