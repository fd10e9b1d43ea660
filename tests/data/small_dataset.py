"""Writes small prepared datasets."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tim4rec_jax.data import format as fmt


def write_dataset(directory, histories, *, n_items=None, order="exact", shards=1, batch_rows=None):
    """Prepares `histories`, a list of (items, timestamps), user "u<row>", item "i<index>"."""
    directory.mkdir(exist_ok=True, parents=True)
    flat = np.concatenate([items for items, _ in histories])
    n_items = n_items or int(flat.max())
    rows = [
        {"user": f"u{row}", "items": list(map(int, items)), "timestamps": list(map(int, times))}
        for row, (items, times) in enumerate(histories)
    ]
    for shard, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        table = pa.Table.from_pylist([rows[row] for row in part], schema=fmt.SEQUENCES_SCHEMA)
        path = directory / fmt.sequences_file(shard, shards)
        with pa.ipc.new_file(path, fmt.SEQUENCES_SCHEMA) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
    items = {
        "index": np.arange(1, n_items + 1),
        "item": [f"i{index}" for index in range(1, n_items + 1)],
        "count": np.bincount(flat, minlength=n_items + 1)[1:],
    }
    pq.write_table(pa.table(items, schema=fmt.ITEMS_SCHEMA), directory / fmt.ITEMS_FILE)
    metadata = {
        "format_version": fmt.FORMAT_VERSION,
        "name": "small",
        "order": order,
        "shards": shards,
        "users": len(rows),
        "items": n_items,
        "events": len(flat),
    }
    (directory / fmt.DATASET_FILE).write_text(json.dumps(metadata))
    return directory


def random_histories(lengths, seed=0, n_items=30, start=880_000_000):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(1, n_items + 1, length),
            start + np.cumsum(rng.integers(0, 500, length) * rng.integers(0, 2, length)),
        )
        for length in lengths
    ]


@pytest.fixture
def histories():
    """One user of each length from 1 to 40."""
    return random_histories(range(1, 41))


@pytest.fixture
def directory(tmp_path, histories):
    return write_dataset(tmp_path / "small", histories, n_items=30)
