"""A prepared dataset on disk: its files, how they are read, and how they are checked.

A dataset is a directory of three or four parts. `data_prep` writes it and `tim4rec_jax.data` reads
it.

- `sequences.arrow` (or `sequences-00000-of-00004.arrow` and so on) holds the events. It is an
  uncompressed Arrow IPC file, so that it can be mapped into memory. It has one row for each user.
  Users are in the order of their first appearance in the filtered source, or of their ids
  (`--stable-ids`), one file after the other.
- `items.parquet` has one row for each item. `index` counts from 1, because 0 is padding. An item
  without events has the `count` 0.
- `item_features.arrow` holds what else is known of the items (`tim4rec_jax.data.features`). Most
  datasets have none.
- `dataset.json` says where the events come from and what was done to them. Readers need the keys
  of `Metadata` at its top level. All other keys are for people.

`content` in `dataset.json` holds digests of the values in the other files, whatever files and
record batches they lie in. So a reader notices damage, and a run tells its dataset from others.
"""

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from annotated_types import Ge, Le
from typing_extensions import TypedDict

from tim4rec_jax.data.features import FEATURES_FILE, FeatureTable, read_features
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import check_file, check_schema, read_json

FORMAT_VERSION = 1

DATASET_FILE = "dataset.json"
ITEMS_FILE = "items.parquet"
SEQUENCES_GLOB = "sequences*.arrow"

_Count = Annotated[int, Ge(1), Le(2**62)]


class _Oracle(TypedDict):
    valid: dict[str, dict[str, float]]
    test: dict[str, dict[str, float]]


class Metadata(TypedDict):
    """What readers need of `dataset.json`.

    `shards`, `users`, `items` and `events` are numbers of what the other files hold. `content` is
    what the function of this name returns; datasets of earlier versions have none. `oracle` is what
    the function of this name in `tim4rec_jax.data_prep.synthetic` returns.
    """

    __pydantic_config__ = {"extra": "allow"}  # noqa: RUF012  # pyright: ignore

    format_version: int
    name: str
    order: Literal["exact", "recbole"]
    shards: Annotated[int, Ge(1), Le(100_000)]
    users: _Count
    items: Annotated[int, Ge(1), Le(2**31 - 2)]
    events: _Count
    content: NotRequired[dict[str, str]]
    oracle: NotRequired[_Oracle]


DATASET_KEYS = ("format_version", "name", "order", "shards", "users", "items", "events")

# The items and the timestamps (seconds since 1970) of a user are in the order of the events.
# Lists are never null and never empty.
SEQUENCES_SCHEMA = pa.schema(
    [
        pa.field("user", pa.string(), nullable=False),
        pa.field("items", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field(
            "timestamps", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False
        ),
    ]
)

# A further column `title: string` (nullable) may follow.
ITEMS_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("item", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),
    ]
)

PREPARE_AGAIN = "prepare the dataset again with `python -m data_prep`"
# A check looks at so many events at a time, which bounds its memory for datasets of any size.
_CHECK_EVENTS = 1 << 18


def sequences_file(shard: int = 0, shards: int = 1) -> str:
    """The name of the sequences file that holds shard `shard` of `shards`, counted from 0."""
    if shards == 1:
        return "sequences.arrow"
    return f"sequences-{shard:05d}-of-{shards:05d}.arrow"


def read_metadata(directory: Path) -> dict:
    """Reads `dataset.json` of a prepared dataset.

    Raises:
      UserError: the file is missing, damaged or of another format version.
    """
    path = directory / DATASET_FILE
    if not path.exists():
        raise UserError(
            f"{path.parent} is not a prepared dataset ({path.name} is missing); make it with "
            f"`python -m data_prep NAME --out {path.parent}`"
        )
    metadata = read_json(path, dict[str, Any], PREPARE_AGAIN)
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version!r}, and this release reads version "
            f"{FORMAT_VERSION}; {PREPARE_AGAIN} of this release"
        )
    check_schema(metadata, Metadata, path, PREPARE_AGAIN)
    return metadata


def read_items(directory: Path, metadata: dict) -> pa.Table:
    """Reads the items of a prepared dataset: `ITEMS_SCHEMA`, and titles if there are any.

    Raises:
      UserError: the file is missing, damaged, or not the one that `metadata` describes.
    """
    path = directory / ITEMS_FILE
    check_file(path, PREPARE_AGAIN)
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # Arrow itself checks buffers, offsets and UTF-8.
    except Exception as error:  # of a damaged file, Arrow can say anything
        raise _unreadable(path, error) from error
    title = table.schema.field("title") if "title" in table.column_names else None
    if list(table.schema)[:3] != list(ITEMS_SCHEMA) or (title and title.type != pa.string()):
        raise _other_columns(path, table.schema, ITEMS_SCHEMA)
    index = table.column("index").to_numpy()
    wrong = np.flatnonzero(index != np.arange(1, len(index) + 1))
    if wrong.size or len(index) != metadata["items"]:
        what = f"row {wrong[0]} has index {index[wrong[0]]}" if wrong.size else f"{len(index)} rows"
        raise UserError(
            f"{path}: {what}, expected indices 1 to {metadata['items']} in order; {PREPARE_AGAIN}"
        )
    if any(table.column(name).null_count for name in ITEMS_SCHEMA.names):
        raise UserError(f"{path} holds a null; {PREPARE_AGAIN}")
    if pc.call_function("count_distinct", [table.column("item")]).as_py() < len(table):
        raise UserError(f"{path} holds an item twice; {PREPARE_AGAIN}")
    check_content(path, items_digests(table), metadata)
    return table


def read_item_features(directory: Path, metadata: dict) -> FeatureTable | None:
    """Reads the features of the items, if `metadata` says that there are any.

    Raises:
      UserError: the file is missing, damaged, or not the one that `metadata` describes.
    """
    if "features" not in metadata.get("content", {}):
        return None
    path = directory / FEATURES_FILE
    found = read_features(directory, metadata["items"], PREPARE_AGAIN)
    if found is None:
        raise UserError(f"{path} is missing; copy it here too, or {PREPARE_AGAIN}")
    check_content(path, {"features": found.digest()}, metadata)
    return found


def map_sequences(directory: Path, metadata: dict) -> Iterator[tuple[pa.RecordBatch, mmap.mmap]]:
    """Maps the sequences files into memory and yields their record batches, each one checked.

    All events are read once for the checks. Record batches without rows are left out. The memory of
    a file is given back before the next one is read, see `release`.

    Yields:
      A record batch, and the mapped file that it is a view on.

    Raises:
      UserError: a file is missing, damaged, or not what `metadata` describes. The message names
        the file, the row where there is one, and the remedy.
    """
    shards = metadata["shards"]
    paths = [directory / sequences_file(shard, shards) for shard in range(shards)]
    for path in paths:
        check_file(path, f"copy it here too, or {PREPARE_AGAIN}", f"{shards} in all")
    for path in paths:
        rows = 0
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            if not reader.schema.equals(SEQUENCES_SCHEMA):
                raise _other_columns(path, reader.schema, SEQUENCES_SCHEMA)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                batch.validate(full=True)  # Arrow itself checks buffers, offsets and UTF-8.
                if not len(batch):
                    continue
                if problem := _first_problem(batch, metadata):
                    row, reason = problem
                    user = batch.column("user")[row].as_py()
                    raise UserError(
                        f"{path}: row {rows + row} (user {user!r}) {reason}; {PREPARE_AGAIN}"
                    )
                yield batch, mapped
                rows += len(batch)
            release(mapped)
        except (pa.ArrowException, OSError, ValueError) as error:  # the last of an empty file
            raise _unreadable(path, error) from error


def release(mapped: mmap.mmap) -> None:
    """Gives back the memory of a mapped file, which is read again when it is needed."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


def list_values(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """The values of a column of lists, all rows one after the other; a view on the mapped file."""
    return batch.column(name).flatten().to_numpy(zero_copy_only=True)


def list_offsets(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """Where each row's list starts in `list_values`, and the end: int64 [rows + 1], from 0."""
    offsets = batch.column(name).offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def _first_problem(batch: pa.RecordBatch, metadata: dict) -> tuple[int, str] | None:
    """The first row of a record batch in which something is wrong, and what is wrong."""
    for column in batch.columns:
        if column.null_count:
            return _first_null(column), "holds a null"
    offsets, time_offsets = list_offsets(batch, "items"), list_offsets(batch, "timestamps")
    unequal = np.flatnonzero(offsets != time_offsets)
    if unequal.size:
        return int(unequal[0]) - 1, "has not as many timestamps as items"
    empty = np.flatnonzero(offsets[1:] == offsets[:-1])
    if empty.size:
        return int(empty[0]), "has no events"
    problem = _first_event_problem(batch, offsets, metadata)
    if not problem:
        return None
    event, reason = problem
    row = int(np.searchsorted(offsets, event, side="right")) - 1
    return row, f"{reason} at event {event - offsets[row]}"


def _first_event_problem(batch, offsets, metadata: dict) -> tuple[int, str] | None:
    """The number of the first event of a record batch that is wrong, and what is wrong with it."""
    for name in ("items", "timestamps"):
        lists = batch.column(name).flatten()
        if lists.null_count:
            return _first_null(lists), f"holds a null in its {name}"
    items, timestamps = list_values(batch, "items"), list_values(batch, "timestamps")
    for first in range(0, len(items), _CHECK_EVENTS):
        some = items[first : first + _CHECK_EVENTS]
        if some.min() < 1 or some.max() > metadata["items"]:
            wrong = int(np.argmax((some < 1) | (some > metadata["items"])))
            return first + wrong, f"has item {some[wrong]}, outside 1 to {metadata['items']},"
        # One event more than of items, so that pairs across two pieces are compared as well.
        times = timestamps[first : first + _CHECK_EVENTS + 1]
        if times.min() < 0:
            return first + int(np.argmax(times < 0)), "has a negative timestamp"
        if metadata["order"] == "recbole":
            times = times.astype(np.float32)
        falls = first + 1 + np.flatnonzero(times[1:] < times[:-1])
        # Time may fall only where the next user starts.
        falls = falls[offsets[np.searchsorted(offsets, falls)] != falls]
        if falls.size:
            return int(falls[0]), f"is not in time order ({metadata['order']})"
    return None


def _first_null(values: pa.Array) -> int:
    return int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))


def _other_columns(path: Path, found: pa.Schema, expected: pa.Schema) -> UserError:
    found, expected = (
        ", ".join(str(field)[len("pyarrow.Field<") : -1] for field in schema)
        for schema in (found, expected)
    )
    return UserError(f"{path} has the columns ({found}) instead of ({expected}); {PREPARE_AGAIN}")


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or incomplete ({first_line(error)}); {PREPARE_AGAIN}")


class SequencesDigest:
    """The digest of the events of a dataset, to which record batches are added one by one.

    It is the SHA-256 of five digests: of the length of each user id in bytes, of the ids, of the
    number of events of each user, of the items and of the timestamps. Lengths and numbers are
    int64, in the byte order of x86.
    """

    def __init__(self):
        self._columns = [hashlib.sha256() for _ in range(5)]

    def update(self, batch: pa.RecordBatch) -> None:
        """Adds the users of a record batch."""
        events = np.diff(list_offsets(batch, "items"))
        values = (list_values(batch, name) for name in ("items", "timestamps"))
        parts = (*_text(batch.column("user")), events, *values)
        for column, part in zip(self._columns, parts, strict=True):
            column.update(np.ascontiguousarray(part).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The digest of all batches so far."""
        return hashlib.sha256(b"".join(column.digest() for column in self._columns)).hexdigest()


def items_digests(table: pa.Table) -> dict[str, str]:
    """The digests of the items: `items` of ids and counts, and `titles` if there are any.

    Each is the SHA-256 of the lengths of the texts in bytes (-1 for none), of the texts and of the
    counts. Lengths and counts are int64, in the byte order of x86.
    """
    parts = {"items": [*_text(table.column("item")), table.column("count").to_numpy()]}
    if "title" in table.column_names:
        parts["titles"] = _text(table.column("title"))
    digests = {name: hashlib.sha256() for name in parts}
    for name, arrays in parts.items():
        for array in arrays:
            digests[name].update(np.ascontiguousarray(array).view(np.uint8).data)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _text(column: pa.Array | pa.ChunkedArray) -> list[np.ndarray]:
    """The length of each text in bytes (-1 for none), and the bytes of all texts."""
    lengths = pc.fill_null(pc.call_function("binary_length", [column]), -1).to_numpy(
        zero_copy_only=False
    )
    filled = pc.fill_null(column, "")
    parts = [np.zeros(0, np.uint8)]
    for chunk in filled.chunks if isinstance(filled, pa.ChunkedArray) else [filled]:
        if len(chunk):
            _, offsets, data = chunk.buffers()
            ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
            parts.append(np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]])
    return [lengths.astype(np.int64), np.concatenate(parts)]


def check_content(path: Path, found: dict[str, str], metadata: dict) -> None:
    """Compares the digests of what a file holds with those in `dataset.json`, where it has them.

    Raises:
      UserError: one differs; the message names the file.
    """
    recorded = metadata.get("content", {})
    if changed := [name for name in found if recorded.get(name, found[name]) != found[name]]:
        raise UserError(
            f"{path} is damaged or of another dataset: its {changed[0]} are not those that "
            f"{DATASET_FILE} was written for; copy it again, or {PREPARE_AGAIN}"
        )


def content(directory: Path, metadata: dict) -> dict[str, str]:
    """The digests of the files of a prepared dataset, for `content` in `metadata`.

    Raises:
      UserError: as `read_items` and `map_sequences`.
    """
    sequences = SequencesDigest()
    for batch, _ in map_sequences(directory, metadata):
        sequences.update(batch)
    digests = {
        "sequences": sequences.hexdigest(),
        **items_digests(read_items(directory, metadata)),
    }
    if features := read_features(directory, metadata["items"], PREPARE_AGAIN):
        digests["features"] = features.digest()
    return digests
