"""Small datasets for tests: random histories, in memory or prepared on disk."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data import Dataset
from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.dataset import Chunk


def random_histories(lengths, *, seed=0, n_items=30, start=880_000_000):
    """Histories as (items, timestamps), half of the gaps 0."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.integers(1, n_items + 1, length, dtype=np.int32),
            start + np.cumsum(rng.integers(0, 500, length) * rng.integers(0, 2, length)),
        )
        for length in lengths
    ]


def in_memory(histories, *, n_items=30, splits=(), ids=None):
    """A `Dataset` of histories; a new chunk starts before each user in `splits`.

    The items are called i1, i2 and so on unless `ids` says otherwise.
    """
    ids = ids or [f"i{index}" for index in range(1, n_items + 1)]
    n_items = len(ids)
    offsets = np.cumsum([0, *(len(items) for items, _ in histories)])
    chunks = []
    for part in np.split(np.arange(len(histories)), sorted(splits)):
        if len(part):
            columns = zip(*(histories[user] for user in part), strict=True)
            chunks.append(Chunk(*map(np.concatenate, columns), start=int(offsets[part[0]])))
    items = np.concatenate([items for items, _ in histories])
    return Dataset(
        directory=Path("memory"),
        metadata={"name": "small", "order": "exact"},
        user_ids=pa.chunked_array([[f"u{row}" for row in range(len(histories))]]),
        item_ids=pa.chunked_array([ids]),
        item_counts=np.bincount(items, minlength=n_items + 1)[1:],
        offsets=offsets,
        chunks=tuple(chunks),
    )


def write_dataset(
    directory, histories, *, n_items=30, order="exact", shards=1, batch_rows=None, ids=None
):
    """Prepares histories in a directory as `data_prep` does."""
    directory.mkdir(exist_ok=True, parents=True)
    dataset = in_memory(histories, n_items=n_items, ids=ids)
    n_items = dataset.n_items
    columns = [
        dataset.user_ids.to_pylist(),
        [items.tolist() for items, _ in histories],
        [timestamps.tolist() for _, timestamps in histories],
    ]
    table = pa.table(columns, schema=fmt.SEQUENCES_SCHEMA)
    for shard, rows in enumerate(np.array_split(np.arange(len(histories)), shards)):
        with pa.ipc.new_file(
            directory / fmt.sequences_file(shard, shards), fmt.SEQUENCES_SCHEMA
        ) as writer:
            writer.write_table(table.take(rows).combine_chunks(), max_chunksize=batch_rows)
    columns = [np.arange(1, n_items + 1), dataset.item_ids, dataset.item_counts]
    pq.write_table(pa.table(columns, schema=fmt.ITEMS_SCHEMA), directory / fmt.ITEMS_FILE)
    values = (1, "small", order, shards, dataset.n_users, n_items, dataset.n_events)
    metadata = dict(zip(fmt.DATASET_KEYS, values, strict=True))
    metadata["content"] = fmt.content(directory, metadata)
    (directory / fmt.DATASET_FILE).write_text(json.dumps(metadata))
    return directory
