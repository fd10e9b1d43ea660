"""The best items of every user, in the ids of the source, as a Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data import Dataset
from tim4rec_jax.evaluation.files import whole_file
from tim4rec_jax.evaluation.loop import Split, run
from tim4rec_jax.evaluation.ranking import top_k
from tim4rec_jax.models import SequenceModel

SCHEMA = pa.schema(
    [("user", pa.string()), ("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())]
)


def write_predictions(
    path: Path, model: SequenceModel, ds: Dataset, split: Split, k: int, **settings: Any
) -> int:
    """Writes the `k` best items of every user with a target in the split, best first.

    A row per user and item: `user`, `rank` (1 = best), `item`, `score`; ids are those of the
    source. Users with short histories come first. Written batch by batch, and complete or
    not there at all.

    Args:
        path: the Parquet file.
        model: see `tim4rec_jax.models`.
        ds: a prepared dataset.
        split: the history ends before the target of this split.
        k: items per user; fewer where the catalogue has no more.
        settings: as for `tim4rec_jax.evaluation.evaluate`.

    Returns:
        Number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    rows = 0
    with whole_file(path) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for users, (scores, items) in run(model, ds, split, _best(k), **settings):
            table = _table(ds, users, scores, items)
            writer.write_table(table)
            rows += len(table)
    return rows


def _best(k: int):
    def best(hidden, table, targets, *, exclude, seen):
        del targets
        return top_k(hidden, table, k, exclude=exclude, seen=seen)

    return best


def _table(ds: Dataset, users, scores, items) -> pa.Table:
    row, rank = np.nonzero(items)  # 0: no item was left
    columns = [
        ds.user_ids.take(users[row]),
        (rank + 1).astype(np.int32),
        ds.item_ids.take(items[row, rank] - 1),
        scores[row, rank].astype(np.float32),
    ]
    return pa.table(columns, schema=SCHEMA)
