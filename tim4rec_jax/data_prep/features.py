"""Reads a table of items and makes of it the features that a dataset keeps.

The table has one row for each item: its id, and a column for each feature. It fits into memory.
What a column is follows from its values, see `_column`.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from tim4rec_jax.data.features import Categorical, Dense, Feature, FeatureTable, list_lengths
from tim4rec_jax.data_prep import files
from tim4rec_jax.data_prep.layout import column_names, guess_delimiter, json_object, listed, sniff
from tim4rec_jax.data_prep.read import NUMBER
from tim4rec_jax.errors import UserError, first_line, one_line

_LARGEST = 3.4e38  # of float32
_MOST_VALUES = 100  # of one item in one column; models compute as many for all items
_REMEDY = "correct it or pass --on-bad-row=skip"
_MEMBERS = ("*.parquet|*.pq|*.csv|*.tsv|*.jsonl|*.ndjson|*.json|*.item",)


@dataclasses.dataclass(frozen=True)
class Choices:
    """What the user says about the table.

    Attributes:
      item: name of the column with the item id.
      title: name of the column with titles, which are shown and are no feature; None: no column.
      title_needed: whether a table without this column is refused.
      columns: the columns to use; None takes all.
      dense: columns of whole numbers or texts to take as amounts, and not as names of something.
      separator: what stands between several values in one text; None: a text is one value.
      skip: whether bad rows are left out, and not an error.
    """

    item: str = "item_id"
    title: str | None = None
    title_needed: bool = True
    columns: tuple[str, ...] | None = None
    dense: tuple[str, ...] = ()
    separator: str | None = None
    skip: bool = False


class ItemTable:
    """A table of items, checked row by row.

    Attributes:
      ids: the id of each item, as a text.
      columns: the columns of features as `FeatureTable.encoded` takes them.
      titles: the title of each id that has one.
      bad: the number of rows that were left out, by reason.
      choices: what the user said about the table.
      sources: the files.
    """

    def __init__(
        self,
        ids: list[str],
        columns: dict[str, Any],
        titles: dict[str, str],
        bad: dict[str, int],
        choices: Choices,
        sources: list[files.SourceFile],
    ):
        self.ids, self.columns, self.titles, self.bad = ids, columns, titles, bad
        self.choices, self.sources = choices, sources

    def of(self, items: Sequence[str]) -> tuple[dict[str, Any], int]:
        """The columns for these items, unknown values for one without a row, and how many have one.

        Raises:
          UserError: none of the items is in the table.
        """
        place = {item: row for row, item in enumerate(self.ids)}
        rows = np.array([place.get(item, -1) for item in items], np.int64)
        found = int((rows >= 0).sum())
        if not found and len(items):
            raise UserError(
                f"none of the {len(items):,} items is in the table of item features: its ids begin "
                f"with {_shown(self.ids)}, and those of the items with {_shown(list(items))}; name "
                "the column with the ids, and check that both are written alike"
            )
        missing = pa.array(rows, mask=rows < 0)
        columns = {
            name: column.take(missing)
            if isinstance(column, pa.Array)
            else np.where((rows >= 0)[:, None], column[rows], np.nan)
            for name, column in self.columns.items()
        }
        return columns, found


def fit(columns: dict[str, Any], min_count: int) -> tuple[FeatureTable, list[str]]:
    """Finds out vocabularies and statistics, and encodes the columns with them.

    Args:
      columns: of the items of a catalogue, as `ItemTable.of` returns them.
      min_count: how many items a value must have to count.

    Returns:
      The features, and a sentence for each column that is left out because it tells nothing, or
      whose values are probably no names.

    Raises:
      UserError: no column is left.
    """
    features: list[Feature] = []
    notes = []
    for name, column in columns.items():
        if isinstance(column, pa.Array):
            counts = collections.Counter(column.flatten().to_pylist())
            with_comma = next((value for value in counts if "," in value), None)
            if with_comma and all(re.fullmatch(NUMBER, one.replace(",", ".")) for one in counts):
                notes.append(
                    f"the column {one_line(name, 40)!r} holds names, and all look like numbers "
                    f"with decimal commas ({one_line(with_comma, 20)}); if they are numbers, write "
                    "them with points"
                )
            frequent = sorted(
                (value for value, count in counts.items() if count >= min_count),
                key=lambda value: (-counts[value], value),
            )
            # A value that every item has tells nothing apart, and so does one that none shares.
            if any(counts[value] < len(column) for value in frequent):
                features.append(Categorical(name, tuple(frequent)))
            else:
                notes.append(
                    f"the column {one_line(name, 40)!r} is left out: it has no value that "
                    f"{min_count} items or more share, and others have not"
                )
            continue
        known = column[~np.isnan(column).any(axis=1)]
        mean = known.mean(axis=0) if len(known) else np.zeros(column.shape[1])
        std = known.std(axis=0) if len(known) else np.zeros(column.shape[1])
        varies = std > 1e-9 * np.maximum(np.abs(mean), 1e-300)
        if varies.any():
            std = np.where(varies, std, 1.0)
            features.append(Dense(name, tuple(mean.tolist()), tuple(std.tolist())))
        else:
            notes.append(
                f"the column {one_line(name, 40)!r} is left out: its numbers are all equal"
            )
    if not features:
        raise UserError(f"no item feature is left: {'; '.join(notes) or 'there is no column'}")
    return FeatureTable.encoded(features, columns), notes


def read_items(inputs: Sequence[str] | pa.Table, choices: Choices, work: Path) -> ItemTable:
    """Reads a table of items.

    Args:
      inputs: paths or globs of CSV, TSV, JSON lines or Parquet files, plain or gzip; or a table.
      choices: what the user says about it.
      work: a folder for members of archives.

    Raises:
      UserError: a file, a column or a row cannot be used. The message names it and the remedy.
    """
    if isinstance(inputs, pa.Table):
        sources = [files.SourceFile("the table of item features", table=inputs)]
    else:
        sources = files.find_files(list(inputs), _MEMBERS, (), work).events
    parts = [_Part(source, choices) for source in sources]
    first = parts[0]
    for part in parts[1:]:
        if {name for name, _ in part.columns} != {name for name, _ in first.columns}:
            raise UserError(
                f"{part.source} has other columns than {first.source}; make them the same"
            )
    problems = _Problems(parts, choices.skip)
    ids = [one for part in parts for one in part.ids]
    titles = [one for part in parts for one in part.titles]
    seen: dict[str, int] = {}
    for row, one in enumerate(ids):
        if not one:
            problems.add(row, "the item id is empty")
        elif seen.setdefault(one, row) != row:
            problem = f"the item {one_line(one, 60)!r} has a row already"
            problems.add(row, problem, "the item has a row already")
    columns = {}
    for name, _ in first.columns:
        kinds = [_column(part, name, choices) for part in parts]
        if len({kind for kind, _ in kinds}) > 1:
            # In one file all prices may be whole numbers.
            wanted = dataclasses.replace(choices, dense=(*choices.dense, name))
            kinds = [_column(part, name, wanted) for part in parts]
        texts = kinds[0][0] == "categorical"
        columns[name] = _texts(name, kinds, problems) if texts else _vectors(name, kinds, problems)
    kept = np.array([row for row in range(len(ids)) if row not in problems.rows], np.int64)
    if not len(kept):
        raise UserError(f"{first.source} has no row that can be used")
    return ItemTable(
        [ids[row] for row in kept],
        {
            name: column.take(pa.array(kept)) if isinstance(column, pa.Array) else column[kept]
            for name, column in columns.items()
        },
        {ids[row]: title for row in kept if (title := titles[row])},
        problems.counts(),
        choices,
        sources,
    )


class _Part:
    """One file of the table.

    Attributes:
      source: the file.
      ids: the item ids, "" for none.
      titles: the title of each; "" or None for none.
      columns: name and values of each feature. Fields of CSV files are texts.
      plain: whether all fields are texts because the format knows no types.
      lines: the line or row of each row, and what to call it.
    """

    def __init__(self, source: files.SourceFile, choices: Choices):
        self.source = source
        kind = sniff(source)
        self.plain, self.word = kind == "csv", "row" if kind in ("arrow", "parquet") else "line"
        if kind in ("arrow", "parquet"):
            table = _typed(source)
            names, self.lines = table.column_names, range(1, len(table) + 1)
            columns = {name: table.column(number) for number, name in enumerate(names)}
        else:
            read = _csv_rows if kind == "csv" else _json_rows
            names, rows, self.lines = read(source)
            columns = {}
            for place, name in enumerate(names):
                values = [row[place] for row in rows]
                if kind == "csv" and name != choices.item:  # ids are those of the log, spaces too
                    values = [value and value.strip() for value in values]
                columns[name] = _as_array(source, name, values)
        if twins := [name for name, n in collections.Counter(names).items() if n > 1]:
            raise UserError(f"{source}: two columns are called {twins[0]!r}; rename one of them")
        titled = choices.title is not None and (choices.title_needed or choices.title in columns)
        shown = (choices.title,) * titled
        wanted = (choices.item, *shown, *(choices.columns or ()), *choices.dense)
        for name in wanted:
            if name not in columns:
                raise UserError(
                    f"{source}: no column {name!r}, there are {listed(tuple(names))}; name yours "
                    "with --item, --item-title, --feature-columns, --dense-features"
                )
        ids = columns[choices.item]
        if not (_is_word(ids.type) or pa.types.is_null(ids.type)):
            raise UserError(
                f"{source}: the column {choices.item!r} has the type {ids.type}; ids are texts or "
                "whole numbers"
            )
        self.ids = [one or "" for one in ids.cast(pa.string()).to_pylist()]
        self.titles: list[str | None] = [None] * len(self.ids)
        if titled:
            titles = columns[choices.title]
            if not (_is_word(titles.type) or pa.types.is_null(titles.type)):
                raise UserError(
                    f"{source}: the column {choices.title!r} has the type {titles.type}; titles "
                    "are texts"
                )
            self.titles = titles.cast(pa.string()).to_pylist()
        taken = (choices.columns and (*choices.columns, *choices.dense)) or names
        others = (name for name in dict.fromkeys(taken) if name not in (choices.item, *shown))
        self.columns = [(name, columns[name]) for name in others]
        if not self.columns and not shown:
            raise UserError(f"{source} has no column besides {choices.item!r}; add features")


class _Problems:
    """Bad rows, numbered over all files: an error, or left out."""

    def __init__(self, parts: list[_Part], skip: bool):
        self._parts, self._skip = parts, skip
        self.rows: dict[int, str] = {}

    def add(self, row: int, problem: str, counted: str = "") -> None:
        """Raises the error, or notes the first problem of a row, to be counted as it is or so."""
        if self._skip:
            self.rows.setdefault(row, counted or problem)
            return
        for part in self._parts:
            if row < len(part.ids):
                raise UserError(
                    f"{part.source}, {part.word} {part.lines[row]}: {problem}; {_REMEDY}"
                )
            row -= len(part.ids)

    def counts(self) -> dict[str, int]:
        """The number of bad rows by reason."""
        return dict(collections.Counter(self.rows.values()))


def _typed(source: files.SourceFile) -> pa.Table:
    if source.table is not None:
        table = source.table
    else:
        try:
            table = pq.ParquetFile(source.path).read()
        except Exception as error:  # of a damaged file, Arrow can say anything
            raise UserError(
                f"{source} is a damaged Parquet file ({first_line(error)}); fetch it again"
            ) from error
    columns = [
        column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    return pa.Table.from_arrays(columns, names=table.column_names)


Rows = tuple[list[str], list[list[Any]], list[int]]


@contextlib.contextmanager
def _opened(source: files.SourceFile) -> Iterator[io.TextIOWrapper]:
    """Opens a text; what is wrong with it becomes one sentence."""
    try:
        with io.TextIOWrapper(files.open_bytes(source.path), "utf-8-sig", newline="") as text:
            yield text
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source} holds bytes that are no UTF-8; convert it with `iconv`"
        ) from error
    except files.GZIP_ERRORS as error:
        raise files.damaged_gzip(source) from error
    except csv.Error as error:
        raise UserError(f"{source}: a quote is out of place ({error}); correct it") from error


def _csv_rows(source: files.SourceFile) -> Rows:
    delimiter = guess_delimiter(source)
    names = list(column_names(source, "csv", delimiter))
    typed = all(re.fullmatch(r".+:(token|float)(_seq)?", name) for name in names)
    if typed:  # RecBole's files of items have types in their header, and no quotes
        names = [name.rsplit(":", 1)[0] for name in names]
    rows, lines = [], []
    with _opened(source) as text:
        how: Any = {"quoting": csv.QUOTE_NONE} if typed else {"strict": True}
        reader = csv.reader(text, delimiter=delimiter, **how)
        next(reader)
        start = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(names):
                raise UserError(
                    f"{source}, line {start}: {len(fields)} fields for {len(names)} columns; "
                    "correct the line"
                )
            if fields:
                rows.append([field if field.strip() else None for field in fields])
                lines.append(start)
            start = reader.line_num + 1
    return names, rows, lines


def _json_rows(source: files.SourceFile) -> Rows:
    found, lines = [], []
    with _opened(source) as text:
        for number, line in enumerate(text, 1):
            if line.strip():
                found.append(json_object(source, number, line))
                lines.append(number)
    names = list(dict.fromkeys(name for one in found for name in one))
    return names, [[one.get(name) for name in names] for one in found], lines


def _as_array(source: files.SourceFile, name: str, values: list[Any]) -> pa.Array:
    """Values of Python as an Arrow array; texts where numbers and texts are mixed."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        if any(isinstance(value, list | dict) for value in values):
            raise UserError(
                f"{source}: the column {one_line(name, 40)!r} holds lists beside single values, or "
                "lists of several types; make them alike, or leave it out with --feature-columns"
            ) from None
        return pa.array([None if value is None else str(value) for value in values], pa.string())
    except UnicodeEncodeError as error:
        raise UserError(f"{source}: the column {one_line(name, 40)!r} holds no UTF-8") from error


def _is_word(kind: pa.DataType) -> bool:
    """Whether a column of this type holds names of something, of which equal ones are the same."""
    texts = (pa.string(), pa.large_string(), pa.string_view())
    return kind in texts or pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _column(part: _Part, name: str, choices: Choices) -> tuple[str, Any]:
    """What kind of feature a column is, and its values.

    Texts, whole numbers and truth values are categorical, and so are lists of them. Other numbers
    are dense, and so are lists of these. In a CSV file, a column is dense if all its fields are
    numbers and one of them has a point or an exponent.
    """
    values = dict(part.columns)[name]
    kind, place = values.type, f"{part.source}: the column {one_line(name, 40)!r}"
    listed_type = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    listed_type = listed_type or pa.types.is_fixed_size_list(kind)
    inner = kind.value_type if listed_type else kind
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    if pa.types.is_null(inner):
        return ("dense" if name in choices.dense else "categorical"), pa.nulls(len(values))
    numeric = pa.types.is_floating(inner) or pa.types.is_decimal(inner)
    if not (numeric or _is_word(inner)):
        raise UserError(
            f"{place} has the type {kind}; make it texts, numbers or lists of them, or leave it "
            "out with --feature-columns"
        )
    texts = inner in (pa.string(), pa.large_string(), pa.string_view())
    if part.plain and texts and not listed_type:
        present = [value for value in values.to_pylist() if value is not None]
        numbers = bool(present) and all(re.fullmatch(NUMBER, value) for value in present)
        numeric = numbers and any(set(value) & set(".eE") for value in present)
    if numeric or name in choices.dense:
        return "dense", values
    return "categorical", _split(values, listed_type, choices.separator if texts else None)


def _split(values: Any, listed_type: bool, separator: str | None) -> list[list[str]]:
    """The values of each item as texts, each once."""
    found = []
    for value in values.to_pylist():
        several = value if listed_type else [value]
        words = ["" if one is None else str(one) for one in several or ()]
        if separator is not None:
            words = [word for text in words for word in text.split(separator)]
        stripped = (word.strip() for word in words)
        found.append(list(dict.fromkeys(word for word in stripped if word)))
    return found


def _texts(name: str, kinds: list[tuple[str, Any]], problems: _Problems) -> pa.Array:
    """The column of a categorical feature."""
    counted = f"more than {_MOST_VALUES} values in the column {one_line(name, 40)!r}"
    lists = [one if isinstance(one, list) else [] for _, part in kinds for one in part]
    for row, words in enumerate(lists):
        if len(words) > _MOST_VALUES:
            problem = f"{len(words):,} values in the column {one_line(name, 40)!r}"
            problems.add(row, f"{problem}; {_MOST_VALUES} can be used", counted)
    return pa.array(lists, pa.list_(pa.string()))


def _vectors(
    name: str, kinds: list[tuple[str, Any]], problems: _Problems
) -> Float[np.ndarray, "N n"]:
    """The column of a dense feature, NaN where an item has none."""
    parts = [_numbers_at_once(part) for _, part in kinds]
    if all(part is not None for part in parts) and len({part.shape[1] for part in parts}) == 1:
        found = np.concatenate(parts)
        partly = np.isnan(found).any(axis=1) & (found.shape[1] > 1)
        # Not only infinite: their squares would be.
        for row in np.flatnonzero((np.abs(found) > _LARGEST).any(axis=1) | partly).tolist():
            problems.add(row, _fault(name, found[row]))
        return found
    rows = [row for _, part in kinds for row in part.to_pylist()]
    size = next((len(row) for row in rows if isinstance(row, list)), 1)
    found = np.full((len(rows), size), np.nan)
    for number, row in enumerate(rows):
        if row is None:
            continue
        several = row if isinstance(row, list) else [row]
        try:
            vector = np.array([_number(one) for one in several])
        except ValueError:
            problems.add(number, f"the value of {one_line(name, 40)!r} is no number")
            continue
        if len(vector) != size:
            problems.add(
                number, f"the vector of {one_line(name, 40)!r} has another length than the first"
            )
        elif (np.abs(vector) > _LARGEST).any() or (np.isnan(vector).any() and size > 1):
            problems.add(number, _fault(name, vector))
        else:
            found[number] = vector
    return found


def _fault(name: str, vector: Float[np.ndarray, " n"]) -> str:
    """What is wrong with the value of a dense feature."""
    wrong = "is more than float32 holds" if np.isfinite(vector).all() else "is not finite"
    return f"the value of {one_line(name, 40)!r} {wrong}"


def _numbers_at_once(values: Any) -> Any:
    """Numbers, or vectors without gaps, as an array [N, n] in one go; None for anything else."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        return np.asarray(values.cast(pa.float64(), safe=False))[:, None]
    if not hasattr(values.type, "value_type") or values.null_count or not len(values):
        return None
    flat = values.flatten()
    lengths = list_lengths(values)
    if flat.null_count or (lengths != lengths[0]).any() or not pa.types.is_floating(flat.type):
        return None
    return np.asarray(flat.cast(pa.float64())).reshape(len(values), lengths[0])


def _number(value: Any) -> float:
    """A number; NaN for none.

    Raises:
      ValueError: the value is a text that is no number.
    """
    if isinstance(value, str) and not re.fullmatch(NUMBER, value):
        raise ValueError(value)
    return np.nan if value is None else float(value)


def _shown(ids: list[str]) -> str:
    return ", ".join(repr(one_line(one, 20)) for one in ids[:3])
