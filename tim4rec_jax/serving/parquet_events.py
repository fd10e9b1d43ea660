"""Events in Parquet files, in any order and larger than memory, user by user."""

from __future__ import annotations

from collections.abc import Iterator

import duckdb
import numpy as np
import pyarrow as pa

from tim4rec_jax.errors import UserError
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.history import Events

_STREAM_EVENTS = 1 << 17  # read at once
_LAST_SECOND = 9_200_000_000  # later times are in another unit
_ROW = "file_row_number"


class ParquetEvents:
    """Events of many users.

    Attributes:
        count: how many there are.
        user_type: as in the files.
    """

    def __init__(
        self,
        con: duckdb.DuckDBPyConnection,
        path: str,
        columns: tuple[str, str, str],
        catalogue: Catalogue,
        *,
        allow_unknown: bool,
    ):
        """Checks all events.

        Args:
            con: sorts them.
            path: of the file, or a glob.
            columns: names of user, item and time.
            catalogue: items known.
            allow_unknown: whether there may be others.

        Raises:
            UserError: a column is missing, or an event that cannot be used, with file and row.
        """
        self._con = con
        user, item, timestamp = map(_name, columns)
        files = f"read_parquet({_text(path)}, filename = '#file', file_row_number = true)"
        types = {name: kind for name, kind, *_ in con.sql(f"DESCRIBE FROM {files}").fetchall()}
        for column in columns:
            if column not in types:
                known = ", ".join(name for name in types if name not in ("#file", _ROW))
                raise UserError(
                    f"{path} has no column {column}, only {known}; name yours with --user, --item, "
                    "--timestamp"
                )
        seconds = _seconds(timestamp, types[columns[2]], path)
        con.execute(
            f"CREATE VIEW events AS SELECT {user} AS user, CAST({item} AS VARCHAR) AS item, "
            f'{seconds} AS time, "#file" AS file, {_ROW} AS number FROM {files}'
        )
        ids = pa.array(catalogue.ids)
        con.register("items", pa.table({"item": ids, "place": np.arange(1, len(ids) + 1)}))
        self._check(allow_unknown)
        # RecBole rounds times before it sorts.
        rounded = catalogue.metadata["order"] == "recbole"
        self._order = f"user, time{'::FLOAT' if rounded else ''}, file, number"
        users = con.sql("SELECT user FROM events LIMIT 0").to_arrow_table()
        self.user_type = users.schema.field("user").type

    def _check(self, allow_unknown: bool) -> None:
        """Counts the events and makes sure that each has what it needs."""
        [self.count] = self._con.sql("SELECT count(*) FROM events").fetchall()[0]
        if not self.count:
            raise UserError("there are no events to recommend from")
        wrong = (
            f"user IS NULL OR item IS NULL OR time IS NULL OR time NOT BETWEEN 0 AND {_LAST_SECOND}"
        )
        if bad := self._con.sql(f"FROM events WHERE {wrong} LIMIT 1").fetchall():
            user, item, seconds, file, number = bad[0]
            fields = {"user": user, "item": item, "time": seconds}
            empty = [name for name, value in fields.items() if value is None]
            reason = f"has no {empty[0]}" if empty else f"has the time {seconds}"
            raise UserError(
                f"{file}: row {number} {reason}; every event needs a user, an item, and a time in "
                "whole seconds since 1970"
            )
        unknown = "FROM events ANTI JOIN items USING (item) LIMIT 1"
        if not allow_unknown and (bad := self._con.sql(unknown).fetchall()):
            _, item, _, file, number = bad[0]
            raise UserError(
                f"{file}: row {number} has item {item!r}, which the model does not know; pass "
                "--on-unknown skip to leave such events out"
            )

    def histories(self) -> Iterator[tuple[pa.Array, Events, int]]:
        """Yields users, their known events, and how many events were not known."""
        stream = self._con.sql(
            "SELECT user, coalesce(place, 0)::INTEGER AS item, time FROM events "
            f"LEFT JOIN items USING (item) ORDER BY {self._order}"
        ).to_arrow_reader(_STREAM_EVENTS)
        held = stream.schema.empty_table()
        for batch in stream:
            held = pa.concat_tables([held, pa.table(batch)]).combine_chunks()
            last = _starts(held)[-1]  # this user's events may go on
            if last:
                yield _split(held.slice(0, last))
                held = held.slice(last)
        yield _split(held)


def _seconds(column: str, kind: str, path: str) -> str:
    if kind.endswith("INT") or kind in ("INTEGER", "UINTEGER"):
        return f"TRY_CAST({column} AS BIGINT)"
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        return f"CAST(floor(epoch({column})) AS BIGINT)"
    raise UserError(
        f"{path}: the column {column} has type {kind}; times must be whole seconds since 1970 or "
        "timestamps"
    )


def _starts(table: pa.Table) -> np.ndarray:
    """Where each user's events start."""
    codes = table.column("user").combine_chunks().dictionary_encode().indices.to_numpy()
    return np.append(0, np.flatnonzero(np.diff(codes)) + 1)


def _split(table: pa.Table) -> tuple[pa.Array, Events, int]:
    starts = _starts(table)
    items, times = table.column("item").to_numpy(), table.column("time").to_numpy()
    known = items > 0
    before = np.append(0, np.cumsum(known))
    events = Events(items[known], times[known], before[np.append(starts, len(items))])
    users = table.column("user").combine_chunks().take(pa.array(starts))
    return users, events, int(len(items) - known.sum())


def _name(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
