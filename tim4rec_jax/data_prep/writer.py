"""Writes a prepared dataset, complete or not at all."""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.features import FEATURES_FILE
from tim4rec_jax.data_prep.engine import Engine, File
from tim4rec_jax.data_prep.features import ItemTable, fit
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_directory, read_regular

_LARGEST_METADATA = 1 << 26  # bytes
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
# What the events of a user are sorted by: nanoseconds, or seconds as 32-bit floats.
ORDERS = {"exact": "nanoseconds", "recbole": "CAST(time AS FLOAT)"}


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
    engine: Engine,
    directory: Path,
    metadata: dict,
    *,
    order: str,
    shard_events: int = SHARD_EVENTS,
    stable_ids: bool = False,
    titles: dict[str, str] | None = None,
    item_table: ItemTable | None = None,
    min_count: int = 2,
    keep_items: bool = False,
) -> dict:
    """Writes the tables `events`, `users` and `items` as a dataset, and closes the engine.

    Args:
      engine: holds the tables.
      directory: exists and is empty.
      metadata: further entries of dataset.json; the counts are added here.
      order: how the events of a user are sorted, `exact` or `recbole`. Ties stay in source order.
      shard_events: a sequences file takes no further user once it holds this many events.
      stable_ids: users and items are numbered in the order of their ids as UTF-8, and not in that
        of their first appearance among the events that the filters left.
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
        engine.rank(
            f"{table}_index",
            'SELECT counts.number, id, events, "first" FROM ('
            f'SELECT "{table}" AS number, count(*) AS events, min("row") AS "first" '
            f'FROM events GROUP BY "{table}") AS counts '
            f"JOIN {table}s AS ids ON counts.number = ids.number",
            "id" if stable_ids else "first",
        )
    shards, users, events = _write_sequences(engine, directory, order, shard_events)
    [(known,)] = engine.rows("SELECT count(*) FROM item_index")
    items = engine.ranked("item_index", 0, known)
    first, last = (
        time // 1_000_000_000 for time in engine.rows("SELECT min(time), max(time) FROM events")[0]
    )
    engine.close()  # Python needs the memory now, to read what has been written
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
        **({"stable_ids": True} if stable_ids else {}),
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
        "title": item_table.choices.title,
        "separator": item_table.choices.separator,
        "items": found,
        "unused": len(item_table.ids) - found,
        "min_count": min_count,
        "keep_items": keep_items,
        "notes": notes,
        "bad_rows": item_table.bad,
    }


def _write_sequences(
    engine: Engine, directory: Path, order: str, shard_events: int
) -> tuple[int, int, int]:
    """Writes the sequences files with one record batch each.

    Returns:
      The number of files, of users and of events.
    """
    # A user belongs to the shard of its first event. Some shards may be empty, so we renumber them.
    shard = f"before {engine.divide} {shard_events}"
    found = engine.rows(
        "SELECT shard, count(*), CAST(sum(events) AS BIGINT) FROM "
        f"(SELECT {shard} AS shard, events FROM user_index) AS users GROUP BY shard ORDER BY shard"
    )
    files, users = [], 0
    for number, (place, count, events) in enumerate(found):
        files.append(File(number, place, users, count, events))
        users += count
    engine.write_files(
        directory,
        files,
        shard,
        'FROM (SELECT items."index" AS item, users."index" AS place, users.before AS before, '
        f'time AS nanoseconds, time {engine.divide} 1000000000 AS time, "row" FROM events '
        'JOIN user_index AS users ON events."user" = users.number '
        "JOIN item_index AS items ON events.item = items.number) AS joined",
        f'place, {ORDERS[order]}, "row"',
        functools.partial(_write_file, len(files)),
    )
    return len(files), users, sum(file.events for file in files)


def _write_file(
    files: int, directory: Path, file: File, users: pa.Table, pieces: Iterable[pa.Table]
) -> None:
    """Writes a sequences file; see `engine.WriteFile`."""
    flat = np.empty(file.events, np.int32), np.empty(file.events, np.int64)
    done = 0
    for piece in pieces:
        for values, column in zip(flat, piece.columns, strict=True):
            values[done : done + len(piece)] = column.to_numpy()
        done += len(piece)
    if done != file.events:
        raise RuntimeError(f"{done} events for a file of {file.events}")
    lengths = users.column("events").to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    columns = [
        users.column("id").combine_chunks(),
        *(
            pa.ListArray.from_arrays(offsets, pa.array(values), field.type)
            for values, field in zip(flat, list(fmt.SEQUENCES_SCHEMA)[1:], strict=True)
        ),
    ]
    path = directory / fmt.sequences_file(file.number, files)
    with pa.ipc.new_file(path, fmt.SEQUENCES_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=fmt.SEQUENCES_SCHEMA))
