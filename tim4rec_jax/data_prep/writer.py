"""Writes a prepared dataset, complete or not at all."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.features import FEATURES_FILE
from tim4rec_jax.data_prep.database import leave_memory
from tim4rec_jax.data_prep.features import ItemTable, fit
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_directory, read_regular

_LARGEST_METADATA = 1 << 26  # bytes
STREAM_EVENTS = 1_000_000  # read from DuckDB at once
SHARD_EVENTS = 16_000_000  # about 200 MB in each file
# The files of a dataset, which --overwrite may remove: those of `write`, and `inspect`'s picture.
_SHARD = "sequences-{0}-of-{0}.arrow".format("[0-9]" * 5)
_OURS = (
    fmt.DATASET_FILE,
    fmt.ITEMS_FILE,
    FEATURES_FILE,
    fmt.sequences_file(),
    _SHARD,
    "inspect.png",
)
# `events.time` is in nanoseconds. A plain `time` would mean the rounded column of the result.
ORDERS = {"exact": "events.time", "recbole": "CAST(events.time // 1000000000 AS FLOAT)"}


@contextlib.contextmanager
def staging(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Gives an empty folder that becomes `out` when the block ends well (`atomic_directory`).

    Args:
      out: the dataset's directory.
      overwrite: replace the dataset that is there.

    Raises:
      UserError: `out` exists and may not be replaced, it holds files that are not of a dataset, or
        another run is writing it.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not _is_dataset(out):
            raise UserError(f"{out} exists and is no prepared dataset; choose another --out")
        if not overwrite:
            raise UserError(
                f"{out} already holds a dataset; pass --overwrite to replace it or choose "
                "another --out"
            )
    with atomic_directory(out, ours=_OURS) as folder:
        yield folder


def _is_dataset(directory: Path) -> bool:
    """Tells whether a folder holds the description of a dataset, of this or another release."""
    try:
        metadata = json.loads(read_regular(directory / fmt.DATASET_FILE, _LARGEST_METADATA))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(metadata, dict) and "format_version" in metadata


def write(
    con: duckdb.DuckDBPyConnection,
    directory: Path,
    metadata: dict,
    *,
    order: str,
    shard_events: int = SHARD_EVENTS,
    titles: dict[str, str] | None = None,
    item_table: ItemTable | None = None,
    min_count: int = 2,
    keep_items: bool = False,
) -> dict:
    """Writes the tables `events`, `users` and `items` as a dataset.

    Args:
      con: holds the tables.
      directory: exists and is empty.
      metadata: further entries of dataset.json; the counts are added here.
      order: how the events of a user are sorted, `exact` or `recbole`. Ties stay in source order.
      shard_events: a sequences file takes no further user once it holds this many events.
      titles: the title of each original item id.
      item_table: the features of items, and their titles.
      min_count: how many items a value of a feature must have to count.
      keep_items: whether the items of this table that have no events follow all others.

    Returns:
      The content of dataset.json.

    Raises:
      UserError: the table of items has nothing to say about these items.
    """
    for table in ("user", "item"):
        # The index follows the first appearance among the events that the filters left.
        con.execute(
            f'CREATE TABLE {table}_index AS SELECT "{table}" AS number, count(*) AS events, '
            f'CAST(row_number() OVER (ORDER BY min("row")) AS INTEGER) AS "index" '
            f'FROM events GROUP BY "{table}"'
        )
    shards, users, events = _write_sequences(con, directory, order, shard_events)
    items = _index(con, "item")
    first, last = con.execute(
        "SELECT min(time) // 1000000000, max(time) // 1000000000 FROM events"
    ).fetchall()[0]
    ids, counts = items.column("id").combine_chunks(), items.column("events").to_numpy()
    told = {}
    if item_table is not None or titles:
        ids = ids.to_pylist()
    if item_table is not None:
        titles = (titles or {}) | item_table.titles
        item_table.of(ids)  # refuses the table of another log before its items are added
    if item_table is not None and (item_table.columns or keep_items):
        told = {"item_features": _write_features(directory, item_table, ids, min_count, keep_items)}
        counts = np.pad(counts, (0, len(ids) - len(counts)))
    table = pa.table([np.arange(1, len(ids) + 1), ids, counts], schema=fmt.ITEMS_SCHEMA)
    if titles:
        found = [titles.get(item) for item in table.column("item").to_pylist()]
        table = table.append_column("title", pa.array(found, pa.string()))
    pq.write_table(table, directory / fmt.ITEMS_FILE)
    metadata = {
        "format_version": fmt.FORMAT_VERSION,
        "name": metadata.pop("name"),
        "users": users,
        "items": len(table),
        "events": events,
        "order": order,
        "shards": shards,
        "time_unit": "s",
        "first_time": first,
        "last_time": last,
        **metadata,
        **told,
    }
    metadata["content"] = fmt.content(directory, metadata)
    (directory / fmt.DATASET_FILE).write_text(
        json.dumps(metadata, indent=2, default=str) + "\n", "utf-8"
    )
    return metadata


def _write_features(
    directory: Path, item_table: ItemTable, ids: list[str], min_count: int, keep_items: bool
) -> dict:
    """Writes the features of the items, to which others are added if all are kept.

    Returns:
      What there is to say about them.
    """
    if keep_items:
        known = set(ids)
        ids += [item for item in item_table.ids if item not in known]
    columns, found = item_table.of(ids)
    features, notes = fit(columns, min_count)
    features.write(directory / FEATURES_FILE)
    return {
        "features": repr(features),
        "item": item_table.choices.item,
        "separator": item_table.choices.separator,
        "items": found,
        "unused": len(item_table.ids) - found,
        "min_count": min_count,
        "keep_items": keep_items,
        "notes": notes,
        "bad_rows": item_table.bad,
    }


def _index(con: duckdb.DuckDBPyConnection, table: str) -> pa.Table:
    return con.sql(
        f'SELECT "index", id, events FROM {table}_index JOIN {table}s USING (number) '
        'ORDER BY "index"'
    ).to_arrow_table()


def _write_sequences(
    con: duckdb.DuckDBPyConnection, directory: Path, order: str, shard_events: int
) -> tuple[int, int, int]:
    """Writes the sequences files with one record batch each.

    Only the users and the events of one file are in memory at once.

    Returns:
      The number of files, of users and of events.
    """
    # A user belongs to the shard of its first event. Some shards may be empty, so we renumber them.
    con.execute(
        'CREATE TABLE shard_users AS SELECT "index", id, events, '
        f'CAST((sum(events) OVER (ORDER BY "index") - events) // {shard_events} AS BIGINT) '
        'AS shard FROM user_index JOIN users USING (number) ORDER BY "index"'
    )
    sizes = con.execute(
        "SELECT shard, count(*), CAST(sum(events) AS BIGINT) FROM shard_users "
        "GROUP BY shard ORDER BY shard"
    ).fetchall()
    stream = (
        con.cursor()
        .sql(
            "SELECT items.index AS item, time // 1000000000 AS time FROM events "
            'JOIN user_index AS users ON events."user" = users.number '
            "JOIN item_index AS items ON events.item = items.number "
            f'ORDER BY users.index, {ORDERS[order]}, "row"'
        )
        .to_arrow_reader(STREAM_EVENTS)
    )
    left = pa.table({"item": pa.array([], pa.int32()), "time": pa.array([], pa.int64())})
    # The events of a file, and as much again for its users and what Arrow has read ahead.
    leave_memory(con, 2 * 12 * max(size for *_, size in sizes))
    for number, (shard, _, size) in enumerate(sizes):
        flat = np.empty(size, np.int32), np.empty(size, np.int64)
        done = 0
        while done < size:
            if not len(left):
                left = pa.table(stream.read_next_batch())
            part, left = left.slice(0, size - done), left.slice(size - done)
            for values, column in zip(flat, part.columns, strict=True):
                values[done : done + len(part)] = column.to_numpy()
            done += len(part)
        users = con.sql(
            f'SELECT id, events FROM shard_users WHERE shard = {shard} ORDER BY "index"'
        ).to_arrow_table()
        lengths = users.column("events").to_numpy()
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        columns = [
            users.column("id").combine_chunks(),
            *(
                pa.ListArray.from_arrays(offsets, pa.array(values), field.type)
                for values, field in zip(flat, list(fmt.SEQUENCES_SCHEMA)[1:], strict=True)
            ),
        ]
        path = directory / fmt.sequences_file(number, len(sizes))
        with pa.ipc.new_file(path, fmt.SEQUENCES_SCHEMA) as writer:
            writer.write_batch(pa.record_batch(columns, schema=fmt.SEQUENCES_SCHEMA))
    con.execute("DROP TABLE shard_users")
    return len(sizes), sum(users for _, users, _ in sizes), sum(size for *_, size in sizes)
