"""Opens a prepared dataset directory: maps it, checks it, says what is wrong with it."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.dataset import Chunk, Dataset
from tim4rec_jax.errors import UserError

# Events looked at in one go: bounds what checking costs in memory, whatever the dataset's size.
_CHECK_EVENTS = 1 << 18
_AGAIN = "prepare the dataset again with `python -m data_prep`"


def open_dataset(directory: str | os.PathLike) -> Dataset:
    """Opens the dataset that `python -m data_prep ... --out DIRECTORY` wrote.

    Events stay in the memory-mapped files. All of them are read once, in small pieces, to
    check them.

    Args:
      directory: a prepared dataset (format: `tim4rec_jax.data.format`).

    Raises:
      UserError: something is missing, damaged or of another format version. Names the file,
        the row where there is one, and the remedy.
    """
    directory = Path(directory)
    metadata = _read_metadata(directory / fmt.DATASET_FILE)
    item_ids, item_counts = _read_items(directory / fmt.ITEMS_FILE, metadata)
    chunks, counts, users = [], [np.zeros(1, np.int64)], []
    for path in _sequence_files(directory, metadata["shards"]):
        row = 0
        for batch in _record_batches(path):
            where = _Rows(path, row, batch.column("user"))
            offsets = _check_lists(where, batch)
            chunk = Chunk(
                start=sum(len(chunk.items) for chunk in chunks),
                items=_mapped(batch.column("items")),
                timestamps=_mapped(batch.column("timestamps")),
            )
            _check_items(where, offsets, chunk.items, metadata["items"])
            _check_times(where, offsets, chunk.timestamps, metadata["order"])
            chunks.append(chunk)
            counts.append(np.diff(offsets))
            users.append(batch.column("user"))
            row += len(batch)
    offsets = np.cumsum(np.concatenate(counts))
    found = {"users": len(offsets) - 1, "events": int(offsets[-1])}
    for key, value in found.items():
        if value != metadata[key]:
            raise UserError(
                f"{directory}: the sequences hold {value} {key} and {fmt.DATASET_FILE} says "
                f"{metadata[key]}; {_AGAIN}"
            )
    if item_counts.sum() != found["events"]:
        raise UserError(
            f"{directory / fmt.ITEMS_FILE}: the counts of the items add up to "
            f"{item_counts.sum()} and there are {found['events']} events; {_AGAIN}"
        )
    user_ids = pa.chunked_array(users, type=pa.string())
    return Dataset(directory, metadata, user_ids, item_ids, item_counts, offsets, tuple(chunks))


def _read_metadata(path: Path) -> dict:
    if not path.is_file():
        raise UserError(
            f"{path.parent} is not a prepared dataset ({path.name} is missing); make it with "
            f"`python -m data_prep NAME --out {path.parent}`"
        )
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {_AGAIN}") from error
    version = metadata.get("format_version") if isinstance(metadata, dict) else None
    if version != fmt.FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, and this release reads version "
            f"{fmt.FORMAT_VERSION}; {_AGAIN} of this release"
        )
    for key in fmt.DATASET_KEYS:
        kind = str if key in ("name", "order") else int
        if not isinstance(metadata.get(key), kind):
            raise UserError(f"{path}: `{key}` is missing or no {kind.__name__}; {_AGAIN}")
    if metadata["order"] not in ("exact", "recbole"):
        raise UserError(f"{path}: unknown event order {metadata['order']!r}; {_AGAIN}")
    return metadata


def _read_items(path: Path, metadata: dict):
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    if list(table.schema)[:3] != list(fmt.ITEMS_SCHEMA):
        raise _other_columns(path, table.schema, fmt.ITEMS_SCHEMA)
    index = table.column("index").to_numpy()
    wrong = np.flatnonzero(index != np.arange(1, len(index) + 1))
    if wrong.size or len(index) != metadata["items"]:
        what = f"row {wrong[0]} has index {index[wrong[0]]}" if wrong.size else f"{len(index)} rows"
        raise UserError(
            f"{path}: {what}, expected indices 1 to {metadata['items']} in order; {_AGAIN}"
        )
    return table.column("item"), table.column("count").to_numpy()


def _sequence_files(directory: Path, shards: int) -> list[Path]:
    paths = [directory / fmt.sequences_file(shard, shards) for shard in range(shards)]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing ({shards} in all); copy it here too, or {_AGAIN}")
    return paths


def _record_batches(path: Path):
    """Yields the record batches of one mapped file, lists checked by Arrow itself."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if not reader.schema.equals(fmt.SEQUENCES_SCHEMA):
            raise _other_columns(path, reader.schema, fmt.SEQUENCES_SCHEMA)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            if len(batch):
                yield batch
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


class _Rows:
    """Names a row of a sequences file in a message."""

    def __init__(self, path: Path, first_row: int, users: pa.Array):
        self.path, self.first_row, self.users = path, first_row, users

    def error(self, row, reason: str) -> UserError:
        user = self.users[int(row)].as_py()
        return UserError(
            f"{self.path}: row {self.first_row + row} (user {user!r}) {reason}; {_AGAIN}"
        )


def _check_lists(where: _Rows, batch: pa.RecordBatch):
    """Returns where each user's events start and end, counted from the batch's first event."""
    for column in batch.columns:
        if column.null_count:
            raise where.error(_first_null(column), "holds a null")
    offsets, times = (
        batch.column(name).offsets.to_numpy().astype(np.int64) for name in ("items", "timestamps")
    )
    offsets, times = offsets - offsets[0], times - times[0]
    unequal = np.flatnonzero(offsets != times)
    if unequal.size:
        raise where.error(unequal[0] - 1, "has not as many timestamps as items")
    empty = np.flatnonzero(offsets[1:] == offsets[:-1])
    if empty.size:
        raise where.error(empty[0], "has no events")
    for name in ("items", "timestamps"):
        values = batch.column(name).flatten()
        if values.null_count:
            row = np.searchsorted(offsets, _first_null(values), side="right") - 1
            raise where.error(row, f"holds a null in its {name}")
    return offsets


def _first_null(values: pa.Array) -> int:
    return int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])


def _mapped(column: pa.ListArray) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=True)


def _check_items(where: _Rows, offsets, items, n_items: int) -> None:
    for first in range(0, len(items), _CHECK_EVENTS):
        part = items[first : first + _CHECK_EVENTS]
        if part.min() < 1 or part.max() > n_items:
            event = first + np.flatnonzero((part < 1) | (part > n_items))[0]
            row = np.searchsorted(offsets, event, side="right") - 1
            raise where.error(row, f"has item {items[event]}, outside 1 to {n_items}")


def _check_times(where: _Rows, offsets, timestamps, order: str) -> None:
    for first in range(0, len(timestamps), _CHECK_EVENTS):
        part = timestamps[first : first + _CHECK_EVENTS + 1]  # one more: pairs across pieces
        negative = np.flatnonzero(part < 0)
        keys = part.astype(np.float32) if order == "recbole" else part
        later = first + 1 + np.flatnonzero(keys[1:] < keys[:-1])
        # Time may fall only where the next user starts.
        later = later[offsets[np.searchsorted(offsets, later)] != later]
        for events, reason in (
            (negative + first, "has a negative timestamp"),
            (
                later,
                f"is not in time order ({order})",
            ),
        ):
            if events.size:
                row = np.searchsorted(offsets, events[0], side="right") - 1
                raise where.error(row, f"{reason} at event {events[0] - offsets[row]}")


def _other_columns(path: Path, found: pa.Schema, expected: pa.Schema) -> UserError:
    found, expected = (
        ", ".join(str(field)[len("pyarrow.Field<") : -1] for field in schema)
        for schema in (found, expected)
    )
    return UserError(f"{path} has the columns ({found}) instead of ({expected}); {_AGAIN}")


def _unreadable(path: Path, error: Exception) -> UserError:
    if not path.exists():
        return UserError(f"{path} is missing; {_AGAIN}")
    return UserError(f"{path} is damaged or incomplete ({error}); {_AGAIN}")
