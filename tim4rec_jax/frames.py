"""Tables of pandas, polars, pyarrow, DuckDB and others as Arrow tables and arrays, and back.

narwhals reads them, so none of these libraries is needed unless its tables are given.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import narwhals.stable.v2 as nw
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64, Num
from narwhals.exceptions import NarwhalsError

from tim4rec_jax.errors import UserError, first_line

NANOSECONDS = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
NAMES = {"user": "user_id", "item": "item_id", "time": "timestamp", "time_unit": "s"}
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_LAST_SECOND = 9_200_000_000  # in the year 2261; a later time is in a finer unit than seconds


def is_frame(table: Any) -> bool:
    """Whether it is a table of a library that narwhals knows."""
    return isinstance(nw.from_native(table, pass_through=True), nw.DataFrame | nw.LazyFrame)


def to_arrow(table: Any, columns: Sequence[str] | None) -> tuple[pa.Table, str]:
    """The columns of a table, and the kind of the table.

    Args:
      table: of any library that narwhals knows. A lazy one is computed.
      columns: which columns; `None` takes all.

    Returns:
      The Arrow table, and what `like` takes to make another table of the same kind.

    Raises:
      UserError: it is no table, a column is missing, or values of a column are of several types.
    """
    try:
        frame: Any = nw.from_native(table)
        names = frame.collect_schema().names()
    except NarwhalsError as error:  # two columns of one name, for example
        reason = " ".join(str(error).split())
        raise UserError(f"the table cannot be read ({reason}); correct it") from error
    except Exception as error:  # narwhals and the libraries behind it have many
        if is_frame(table):
            raise UserError(f"the table cannot be read: {error}") from error
        raise UserError(
            f"{type(table).__name__} is no table; give one of pandas, polars, pyarrow or DuckDB"
        ) from error
    for column in columns or ():
        if column not in names:
            raise UserError(
                f"the table has no column {column!r}, only {', '.join(map(str, names))}; name "
                "yours with user=, item=, time="
            )
    try:
        frame = frame if columns is None else frame.select(*dict.fromkeys(columns))
        found = frame.collect("pyarrow") if isinstance(frame, nw.LazyFrame) else frame
        arrow = found.to_arrow()
    except (pa.ArrowException, TypeError) as error:
        raise UserError(
            f"a column holds values of several types ({error}); convert it to texts first"
        ) from error
    except (NarwhalsError, UnicodeError) as error:
        raise UserError(f"the table cannot be read ({first_line(error)}); correct it") from error
    return arrow.replace_schema_metadata(None), frame.implementation.name.lower()


def like(table: pa.Table, kind: str) -> Any:
    """The table as one of the kind that `to_arrow` found.

    Args:
      table: the content.
      kind: of the table to make. "" is pandas, polars or pyarrow, whichever is installed.
    """
    if kind == "duckdb":
        import duckdb

        return duckdb.from_arrow(table)
    if kind not in ("pandas", "polars", "pyarrow", "modin", "cudf"):
        installed = (name for name in ("pandas", "polars") if importlib.util.find_spec(name))
        kind = next(installed, "pyarrow")
    backend: Any = kind
    return table if kind == "pyarrow" else nw.from_arrow(table, backend=backend).to_native()


def ids(column: pa.ChunkedArray | pa.Array, name: str) -> tuple[pa.Array, pa.DataType]:
    """Ids as texts, as a prepared dataset holds them; nulls stay.

    Args:
      column: texts, or whole numbers. A column of floats may hold whole numbers, too, because
        pandas makes floats of whole numbers with gaps.
      name: of the column, for the message.

    Returns:
      The texts, and the type that `typed` takes to make the ids of the table again.

    Raises:
      UserError: the ids are neither texts nor whole numbers.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_floating(kind):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowException:
            kind = None
        else:
            kind = pa.int64()
    if kind is None or not (pa.types.is_integer(kind) or pa.types.is_null(kind) or kind in _TEXTS):
        raise UserError(
            f"the column {name!r} holds {column.type}; ids are texts or whole numbers, so convert "
            "it first"
        )
    texts = column.cast(pa.string())
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    return texts, pa.string() if pa.types.is_null(kind) else kind


def typed(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    """Ids in the type that `ids` found; texts where an id is no whole number."""
    try:
        return texts.cast(kind)
    except pa.ArrowInvalid:
        return texts


def is_temporal(kind: pa.DataType) -> bool:
    """Whether a column of this type holds dates or moments."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def times(
    column: pa.ChunkedArray, name: str, unit: str
) -> tuple[Num[np.ndarray, " N"], Int64[np.ndarray, " N"]]:
    """The times of a column, as they are and in whole seconds since 1970.

    Args:
      column: dates or moments (UTC where they have no zone), or numbers since 1970, or texts of
        either, as the preparation reads them.
      name: of the column, for the message.
      unit: of numbers: "s", "ms", "us" or "ns". With "iso", texts are dates, and numbers seconds.

    Returns:
      The numbers of the column, in its own unit, by which events can be ordered; the seconds.

    Raises:
      UserError: a time is missing, before 1970 or implausible in this unit, or is of another type.
    """
    if unit not in (*NANOSECONDS, "iso"):
        raise UserError(f"time_unit is {unit!r}; it must be one of {', '.join(NANOSECONDS)}, iso")
    missing = np.asarray(column.is_null(nan_is_null=True))
    if missing.any():
        raise UserError(f"row {int(np.argmax(missing))} of the table has no {name!r}")
    if column.type in _TEXTS:
        column, unit = _read_texts(column, name, unit), "s"
    elif unit == "iso":
        unit = "s"
    if is_temporal(column.type):
        unit = column.type.unit if pa.types.is_timestamp(column.type) else "us"
        column = column.cast(pa.timestamp(unit), safe=False).cast(pa.int64())
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise UserError(
            f"the column {name!r} holds {column.type}; times are dates, or numbers since 1970"
        )
    values = column.to_numpy()
    per_second = NANOSECONDS["s"] // NANOSECONDS[unit]
    wrong = (values < 0) | (values > _LAST_SECOND * per_second)
    if wrong.any():
        row = int(np.argmax(wrong))
        finer = (other for other in NANOSECONDS if _plausible(float(values[row]), other))
        remedy = "" if values[row] < 0 else f"; pass time_unit={next(finer, 'ns')!r}"
        raise UserError(
            f"row {row} of the table has the time {values[row]}, which is no plausible number of "
            f"{unit} since 1970{remedy}"
        )
    return values, (values // per_second).astype(np.int64)


def _read_texts(column: pa.ChunkedArray, name: str, unit: str) -> pa.ChunkedArray:
    """The seconds since 1970 that texts say, by the code that reads files."""
    # Here and not above, because dates and numbers need no database.
    from tim4rec_jax.data_prep.events import read_events

    rows = pa.repeat("-", len(column))  # rows have a user and an item there
    table = pa.table([rows, rows, column], names=["user", "item", "time"])
    try:
        read, _ = read_events(table, user="user", item="item", time="time", time_unit=unit)  # pyright: ignore
    except UserError as error:
        said = str(error).partition(";")[0].removeprefix("the table, ")
        raise UserError(
            f"{name!r} of the table, {said}; times are dates, or numbers since 1970 in the unit "
            f"time_unit={unit!r}, where 'iso' says that texts are dates"
        ) from error
    return read["time"]


def _refuse_dates_as_numbers(values: Num[np.ndarray, " N"], name: str) -> None:
    """Refuses times most of which are dates such as 20240131; as seconds, all are in August 1970.

    Raises:
      UserError: they are.
    """
    year, month, day = values // 10_000, values // 100 % 100, values % 100
    dates = (year >= 1900) & (year < 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    if 2 * dates.sum() > len(values):
        row = int(np.argmax(dates))
        raise UserError(
            f"row {row} of the table has the time {values[row]}, a date written as a number, and "
            f"so have {dates.sum():,} of {len(values):,} rows; make {name!r} a column of dates (in "
            "pandas with to_datetime(column, format='%Y%m%d'))"
        )


def _refuse_coarser_times(values: Num[np.ndarray, " N"], unit: str) -> None:
    """Refuses numbers that are all dates of our days in a coarser unit, as the preparation does.

    Raises:
      UserError: they are.
    """
    if unit in ("s", "iso") or not len(values):
        return
    # Here and not above, because seconds need no database.
    from tim4rec_jax.data_prep.read import GIVE_FLAG, refuse_coarser_times

    first, last = (int(value) * NANOSECONDS[unit] for value in (values.min(), values.max()))
    try:
        refuse_coarser_times(first, last, [unit])
    except UserError as error:
        said, _, other = str(error).partition(f"{GIVE_FLAG}--time-unit ")
        raise UserError(f"{said}pass time_unit={other!r}") from error


def _plausible(value: float, unit: str) -> bool:
    """Whether a number gives a date between 1973 and 2261."""
    return 1e8 < value * NANOSECONDS[unit] / NANOSECONDS["s"] < _LAST_SECOND


def moments(at: Any) -> Int64[np.ndarray, " N"] | int | None:
    """Moments in whole seconds since 1970: one, or an array; None stays.

    Args:
      at: a date, a text that says one, a number since 1970, or a list, array or column of such.

    Raises:
      UserError: it is something else.
    """
    if at is None:
        return None
    one = isinstance(at, str) or not (isinstance(at, Sequence) or hasattr(at, "__len__"))
    try:
        given = pa.chunked_array([array([at] if one else at)])
        if given.type == pa.string():
            given = given.cast(pa.timestamp("us"))
    except (pa.ArrowException, UserError) as error:
        raise UserError(f"`at` is {at!r}, which is no date and no number since 1970") from error
    _, found = times(given, "at", "s")
    return int(found[0]) if one else found


def array(values: Any) -> pa.Array | pa.ChunkedArray:
    """A list, an array or a column of ids as an Arrow array.

    Raises:
      UserError: it is one text, or holds values of several types.
    """
    if isinstance(values, str | bytes):
        raise UserError(f"{values!r} is one id; give a list of ids")
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        return pa.array(values.to_numpy() if hasattr(values, "to_numpy") else values)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"the ids cannot be read: {error}") from error


def positions(values: pa.Array, among: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The position of each value, null where it is not there."""
    return pc.call_function("index_in", [values], pc.SetLookupOptions(among))


def id_texts(table: pa.Table, user: str, item: str) -> tuple[pa.Table, dict[str, str]]:
    """An Arrow table with texts in two columns of ids, and the types of "user" and "item" before.

    Raises:
      UserError: as for `ids`.
    """
    types = {}
    for name, column in (("user", user), ("item", item)):
        texts, kind = ids(table[column], column)
        table = table.set_column(table.column_names.index(column), column, texts)
        types[name] = str(kind)
    return table, types


def item_table(table: Any, item: str) -> pa.Table:
    """A table of item features as an Arrow table with texts for ids.

    Args:
      table: of any library that narwhals knows, with a row for each item.
      item: the column with the ids.

    Raises:
      UserError: as for `to_arrow` and `ids`.
    """
    columns, _ = to_arrow(table, None)
    if item not in columns.column_names:
        raise UserError(
            f"the table of item features has no column {item!r}, only "
            f"{', '.join(columns.column_names)}; name it as in the table of events"
        )
    columns = columns.select(  # pandas gives its index along
        [name for name in columns.column_names if not name.startswith("__index_level_")]
    )
    texts, _ = ids(columns[item], item)
    return columns.set_column(columns.column_names.index(item), item, texts)


@dataclasses.dataclass(frozen=True)
class Histories:
    """The events of a table, by user and in order of time.

    Attributes:
      users: the ids of the users, in the order of their first events.
      user_type: of the ids in the table; see `typed`.
      item_type: likewise.
      kind: of the table; see `like`.
      lengths: the number of events of each user.
      items: the indices of the items, from 1, of one user after the other.
      times: in seconds since 1970, likewise.
    """

    users: pa.Array
    user_type: pa.DataType
    item_type: pa.DataType
    kind: str
    lengths: Int64[np.ndarray, " U"]
    items: Int32[np.ndarray, " N"]
    times: Int64[np.ndarray, " N"]

    def of(
        self, chosen: Int64[np.ndarray, " C"]
    ) -> tuple[Int32[np.ndarray, " M"], Int64[np.ndarray, " M"], Int64[np.ndarray, " ends"]]:
        """The items and times of some users, one after the other, and the ends between them."""
        starts, counts = (np.cumsum(self.lengths) - self.lengths)[chosen], self.lengths[chosen]
        offsets = np.append(0, np.cumsum(counts))
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return self.items[places], self.times[places], offsets


def histories(table: Any, names: dict[str, str], known: pa.Array, *, rounded: bool) -> Histories:
    """Reads a table of events in any order. Events of unknown items are left out.

    Args:
      table: of any library that narwhals knows.
      names: the columns "user", "item" and "time", and the "time_unit" of numbers.
      known: the ids of the known items, in the order of their indices.
      rounded: whether events are in the order of their times in float32, as RecBole sorts them.

    Raises:
      UserError: a column is missing, or a row has no user, item or time that can be right.
    """
    wanted = [names["user"], names["item"], names["time"]]
    events, kind = to_arrow(table, wanted)
    for name in wanted[:2]:
        if events[name].null_count:
            row = pc.index(events[name].is_null(), True).as_py()
            raise UserError(f"row {row} of the table has no {name!r}")
    users, user_type = ids(events[wanted[0]], wanted[0])
    items, item_type = ids(events[wanted[1]], wanted[1])
    when = events[wanted[2]]
    exact, seconds = times(when, wanted[2], names["time_unit"])
    if not (is_temporal(when.type) or when.type in _TEXTS):
        _refuse_dates_as_numbers(exact, wanted[2])
        _refuse_coarser_times(exact, names["time_unit"])
    encoded = users.dictionary_encode()
    codes = encoded.indices.to_numpy()
    indices = positions(items, known).fill_null(-1).to_numpy().astype(np.int32) + 1
    # Whole seconds would leave the events of a second in the order of their rows.
    order = np.lexsort((seconds.astype(np.float32) if rounded else exact, codes))
    order = order[indices[order] > 0]
    lengths = np.bincount(codes[order], minlength=len(encoded.dictionary))
    return Histories(
        encoded.dictionary, user_type, item_type, kind, lengths, indices[order], seconds[order]
    )
