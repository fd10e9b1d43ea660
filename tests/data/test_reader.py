"""What a prepared dataset holds comes back; whatever is wrong with it is named."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tim4rec_jax.data import format as fmt
from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import UserError

HISTORIES = random_histories(range(1, 13))


@pytest.mark.parametrize("layout", [{}, {"batch_rows": 5}, {"shards": 3}, {"shards": 15}])
def test_reads_back_what_was_written(tmp_path, layout):
    dataset = open_dataset(write_dataset(tmp_path, HISTORIES, **layout))
    assert (dataset.name, dataset.order, dataset.directory) == ("small", "exact", tmp_path)
    assert (dataset.n_users, dataset.n_items, dataset.n_events) == (12, 30, 78)
    assert dataset.user_ids.to_pylist() == [f"u{row}" for row in range(12)]
    assert dataset.item_ids[4].as_py() == "i5"
    assert dataset.item_counts.sum() == 78
    np.testing.assert_array_equal(dataset.lengths, range(1, 13))
    starts = dataset.offsets[:-1]
    for row, (items, timestamps) in enumerate(HISTORIES):
        length = len(items)
        np.testing.assert_array_equal(
            dataset.items(starts, dataset.lengths, 12)[row], np.pad(items, (0, 12 - length))
        )
        np.testing.assert_array_equal(
            dataset.timestamps(starts, dataset.lengths, 12)[row],
            np.pad(timestamps, (0, 12 - length)),
        )


def test_a_dataset_is_shown_in_one_line(tmp_path):
    dataset = open_dataset(write_dataset(tmp_path, HISTORIES))
    assert repr(dataset) == "Dataset(small: 12 users, 30 items, 78 events, leave one out)"


def test_events_stay_in_the_mapped_file(tmp_path):
    before = pa.total_allocated_bytes()
    dataset = open_dataset(write_dataset(tmp_path, random_histories([20_000])))
    assert pa.total_allocated_bytes() - before < 20_000
    assert not dataset.chunks[0].items.flags.owndata


def test_a_sliced_record_batch_is_read_from_its_first_row(tmp_path):
    path = write_dataset(tmp_path, HISTORIES) / fmt.sequences_file()
    batch = pa.ipc.open_file(path).get_batch(0)
    column = batch.column("items")
    values = np.concatenate([[9, 9], column.values]).astype(np.int32)
    moved = pa.ListArray.from_arrays(
        pa.array(column.offsets.to_numpy() + 2), values, type=column.type
    )
    rewrite(path, batch.set_column(1, fmt.SEQUENCES_SCHEMA.field(1), moved))
    np.testing.assert_array_equal(open_dataset(tmp_path).chunks[0].items, values[2:])


def rewrite(path, batch):
    with pa.ipc.new_file(path, batch.schema) as writer:
        writer.write_batch(batch)


def edit_metadata(**changes):
    def edit(directory):
        path = directory / fmt.DATASET_FILE
        metadata = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))

    return edit


def edit_column(name, change):
    """Rewrites the sequences with a changed list of lists (or of users)."""

    def edit(directory):
        path = directory / fmt.sequences_file()
        columns = pa.ipc.open_file(path).read_all().to_pydict()
        change(columns[name])
        rewrite(path, pa.record_batch(list(columns.values()), schema=fmt.SEQUENCES_SCHEMA))

    return edit


def set_event(row, event, value):
    return lambda column: column[row].__setitem__(event, value)


def cut(name, keep):
    """Leaves the first bytes of a file, or of all but the last if negative."""
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:keep])


def break_offsets(directory):
    path = directory / fmt.sequences_file()
    batch = pa.ipc.open_file(path).get_batch(0)
    column = batch.column("items")
    offsets = column.offsets.to_numpy().copy()
    offsets[3] = 60
    buffers = [None, pa.py_buffer(offsets)]
    broken = pa.ListArray.from_buffers(column.type, len(column), buffers, children=[column.values])
    rewrite(path, batch.set_column(1, fmt.SEQUENCES_SCHEMA.field(1), broken))


def edit_items(change):
    def edit(directory):
        table = pq.read_table(directory / fmt.ITEMS_FILE)
        pq.write_table(change(table), directory / fmt.ITEMS_FILE)

    return edit


def remove(name):
    return lambda directory: (directory / name).unlink()


SEQUENCES, ITEMS, DATASET = fmt.sequences_file(), fmt.ITEMS_FILE, fmt.DATASET_FILE


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(DATASET), r"not a prepared dataset.*missing.*python -m data_prep NAME"),
        (cut(DATASET, -5), r"dataset\.json is not valid JSON"),
        (edit_metadata(format_version=2), r"format version 2, and this release reads version 1"),
        (edit_metadata(format_version=None), r"format version None"),
        (edit_metadata(oracle={"uest": {}}), r"dataset\.json is damaged \(`oracle\.valid` is"),
        (edit_metadata(order=None), r"dataset\.json is damaged \(`order` is missing\); prepare"),
        (edit_metadata(order="random"), r"`order` should be 'exact' or 'recbole'"),
        (edit_metadata(users="12"), r"`users` should be a valid integer"),
        (edit_metadata(users=13), r"hold 12 users and dataset\.json says 13"),
        (edit_metadata(events=79), r"hold 78 events and dataset\.json says 79"),
        (edit_metadata(items=31), r"items\.parquet: 30 rows, expected indices 1 to 31"),
        (edit_metadata(shards=2), r"sequences-00000-of-00002\.arrow is missing \(2 in all\)"),
        (remove(SEQUENCES), r"sequences\.arrow is missing"),
        (cut(SEQUENCES, 0), r"sequences\.arrow is damaged or incomplete"),
        (cut(SEQUENCES, 300), r"sequences\.arrow is damaged or incomplete"),
        (cut(SEQUENCES, -1), r"sequences\.arrow is damaged or incomplete"),
        (break_offsets, r"sequences\.arrow is damaged or incomplete \(.*slot 4"),
        (remove(ITEMS), r"items\.parquet is missing"),
        (cut(ITEMS, -1), r"items\.parquet is damaged or incomplete"),
        (edit_items(lambda table: table.slice(1)), r"row 0 has index 2, expected indices 1 to 30"),
        (
            edit_items(lambda table: table.select([0, 1])),
            r"columns \(index: .*\) instead of",
        ),
        (edit_items(lambda table: table.slice(0, 29)), r"29 rows, expected indices 1 to 30"),
        (edit_column("items", set_event(5, 2, 31)), r"row 5 \(user 'u5'\) has item 31, outside 1"),
        (edit_column("items", set_event(5, 0, 0)), r"row 5 \(user 'u5'\) has item 0, outside 1"),
        (edit_column("items", set_event(0, 0, -7)), r"row 0 \(user 'u0'\) has item -7"),
        (edit_column("timestamps", set_event(7, 0, -1)), r"row 7 .* negative timestamp at event 0"),
        (
            edit_column("timestamps", set_event(7, 3, 10**12)),
            r"row 7 .* is not in time order \(exact\) at event 4",
        ),
        (edit_column("items", lambda rows: rows[4].append(1)), r"row 4 .* as many timestamps"),
        (edit_column("items", lambda rows: rows[11].pop()), r"row 11 .* as many timestamps"),
        (
            edit_column("user", lambda rows: rows.__setitem__(2, None)),
            r"row 2 .* holds a null;",
        ),
        (edit_column("items", lambda rows: rows.__setitem__(3, None)), r"row 3 .* holds a null;"),
        (edit_column("items", set_event(5, 0, None)), r"row 5 .* holds a null in its items"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write_dataset(tmp_path, HISTORIES)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path)
    assert "data_prep" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_wrong_columns_are_named(tmp_path):
    path = write_dataset(tmp_path, HISTORIES) / SEQUENCES
    rewrite(path, pa.record_batch({"user": ["a"], "items": [[1]]}))
    with pytest.raises(UserError, match=r"columns \(user: string, items: list<item: int64>\)"):
        open_dataset(tmp_path)


def test_users_without_events_are_named(tmp_path):
    write_dataset(tmp_path, HISTORIES)
    edit_column("items", lambda rows: rows[3].clear())(tmp_path)
    edit_column("timestamps", lambda rows: rows[3].clear())(tmp_path)
    with pytest.raises(UserError, match=r"row 3 \(user 'u3'\) has no events"):
        open_dataset(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_dataset(tmp_path, HISTORIES, shards=4)
    remove("sequences-00002-of-00004.arrow")(tmp_path)
    with pytest.raises(UserError, match=r"sequences-00002-of-00004\.arrow is missing \(4 in all"):
        open_dataset(tmp_path)


def test_rows_are_counted_within_the_file(tmp_path):
    histories = random_histories([3] * 12)
    histories[8][0][1] = 31
    write_dataset(tmp_path, histories, shards=2, batch_rows=2, n_items=31)
    edit_items(lambda table: table.slice(0, 30))(tmp_path)
    edit_metadata(items=30, content=None)(tmp_path)
    with pytest.raises(UserError, match=r"sequences-00001.* row 2 \(user 'u8'\) has item 31"):
        open_dataset(tmp_path)


def test_the_float32_order_allows_what_float32_cannot_tell_apart(tmp_path):
    times = np.array([960_000_020, 960_000_010, 960_000_015])  # float32 is 64 s apart here
    items = np.array([1, 2, 3], np.int32)
    open_dataset(write_dataset(tmp_path, [(items, times)], order="recbole"))
    with pytest.raises(UserError, match=r"not in time order \(exact\) at event 1"):
        open_dataset(write_dataset(tmp_path, [(items, times)]))
    times[2] -= 1000
    with pytest.raises(UserError, match=r"not in time order \(recbole\) at event 2"):
        open_dataset(write_dataset(tmp_path, [(items, times)], order="recbole"))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_checks_hold_across_their_pieces(tmp_path, monkeypatch, size):
    monkeypatch.setattr(fmt, "_CHECK_EVENTS", size)
    write_dataset(tmp_path, HISTORIES)
    open_dataset(tmp_path)
    edit_column("timestamps", set_event(9, 6, 0))(tmp_path)
    with pytest.raises(UserError, match=r"row 9 .* is not in time order \(exact\) at event 6"):
        open_dataset(tmp_path)
    write_dataset(tmp_path, HISTORIES)
    edit_column("items", set_event(11, 11, 0))(tmp_path)
    with pytest.raises(UserError, match=r"row 11 .* has item 0"):
        open_dataset(tmp_path)


def test_importing_the_package_imports_no_jax():
    code = "import sys, tim4rec_jax.data; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
