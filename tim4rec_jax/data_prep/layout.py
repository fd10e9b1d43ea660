"""Describes a source file: its format, its columns and their meaning."""

import csv
import dataclasses
import difflib
import json
import sys
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data_prep.files import SourceFile, first_line
from tim4rec_jax.errors import UserError, one_line
from tim4rec_jax.errors import first_line as first_line_of

Kind = Literal["csv", "split", "json", "literal", "parquet", "arrow"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The format of a file and the meaning of its columns.

    Attributes:
      kind: `csv` (quotes allowed), `split` (one event in each line, cut at `delimiter`, no
        quotes), `json` (one object in each line), `literal` (one Python dictionary in each line),
        `parquet`, or `arrow` for a table in memory.
      columns: names of all columns; for `json` and `literal` the keys that are read.
      user: name of the column with the user id.
      item: name of the column with the item id.
      time: name of the column with the time.
      rating: name of the column with the rating; None if there is none.
      time_unit: `s`, `ms`, `us` or `ns` since 1970, or `iso` for dates, in UTC if they name no
        zone. Numbers are decimal, of ASCII digits, with blanks around them at most.
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


def sniff(file: SourceFile) -> Kind:
    """Tells Parquet, JSON lines and delimited text apart by content, not by name.

    Raises:
      UserError: the file is empty, a damaged gzip file, no text or one JSON array.
    """
    if file.table is not None:
        return "arrow"
    with open(file.path, "rb") as content:
        if content.read(4) == b"PAR1":
            return "parquet"
    start = first_line(file).lstrip()[:1]
    if start == "[":
        raise UserError(f"{file} is one JSON array; write one object a line (`jq -c '.[]'`)")
    return "json" if start == "{" else "csv"


def column_names(file: SourceFile, kind: Kind, delimiter: str) -> tuple[str, ...]:
    """Returns the column names of a table, a Parquet file, a header line or a first JSON object.

    Raises:
      UserError: the file is damaged, or its first line holds no names.
    """
    if kind in ("arrow", "parquet"):
        return tuple(schema(file).names)
    line = first_line(file)
    if kind == "json":
        return tuple(json_object(file, 1, line))
    if kind == "split":
        return tuple(line.split(delimiter))
    csv.field_size_limit(sys.maxsize)
    try:
        found = next(csv.reader([line], delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{file}, line 1: not a line of column names ({error}); write one, or pass --columns"
        ) from error
    return tuple(column or f"column {number}" for number, column in enumerate(found, 1))


def schema(file: SourceFile) -> pa.Schema:
    """Returns the columns of a table or a Parquet file, and their types.

    Raises:
      UserError: the file is damaged.
    """
    if file.table is not None:
        return file.table.schema
    try:
        return pq.read_schema(file.path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is a damaged Parquet file ({error}); fetch it again") from error


def json_object(file: SourceFile, number: int, line: str) -> dict[str, Any]:
    """Reads a line of JSON lines.

    Args:
      file: for the message.
      number: of the line, from 1.
      line: its text.

    Raises:
      UserError: it is no JSON, or no object.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}, line {number}: not valid JSON ({first_line_of(error)}); write one object a "
            "line"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{file}, line {number}: no JSON object; write one object a line")
    return found


def guess_delimiter(file: SourceFile) -> str:
    """Returns tab, comma, semicolon or bar, whichever is most frequent in the first line."""
    line = first_line(file)
    return max("\t,;|", key=line.count)


def check_columns(file: SourceFile, layout: Layout, remedy: str) -> Layout:
    """Checks that a file has the columns that its layout names.

    Args:
      file: the file.
      layout: its layout.
      remedy: what the user can do about a missing column.

    Returns:
      The layout. Times that are dates by their type are read as dates, whatever unit it names.

    Raises:
      UserError: a column is missing, there twice, or of a type that is no id. The message names
        it, the most similar one and the remedy.
    """
    columns = layout.columns
    used = [layout.user, layout.item, layout.time, layout.rating]
    _refuse_twins(file, layout)
    for column in used:
        if column is not None and column not in columns:
            near = difflib.get_close_matches(column, columns[:1000], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(
                f"{file}, line 1: no column {column!r}{hint}, there are {listed(columns)}; {remedy}"
            )
    if layout.user == layout.item:
        raise UserError(f"{file}: {layout.user!r} is named as the user and as the item; {remedy}")
    if layout.kind not in ("arrow", "parquet"):
        return layout
    types = schema(file).types
    for column in (layout.user, layout.item):
        kind = types[columns.index(column)]
        if pa.types.is_nested(kind) or _is_bytes(kind):
            raise UserError(
                f"{file}: the column {column!r} has the type {kind}; make it a text or a number"
            )
    kind = types[columns.index(layout.time)]
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return dataclasses.replace(layout, time_unit="iso")
    return layout


def _refuse_twins(file: SourceFile, layout: Layout) -> None:
    """Refuses columns of one name; with a condition also those that are the same for SQL."""
    seen: dict[str, str] = {}
    for column in layout.columns:
        key = column.casefold() if layout.where else column
        if key in seen:
            before = seen[key]
            two = f"{column!r}" if before == column else f"{before!r} and {column!r}"
            same = "" if before == column else ", which is the same name in --where"
            raise UserError(f"{file}: two columns are called {two}{same}; rename one of them")
        seen[key] = column


def _is_bytes(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def listed(columns: tuple[str, ...]) -> str:
    """Names the first columns, for a message."""
    more = f" and {len(columns) - 8:,} more" if len(columns) > 8 else ""
    return ", ".join(one_line(column, 40) for column in columns[:8]) + more
