"""How fast training batches are made, and what memory that takes.

    python -m benchmarks.data_pipeline [--dataset DIR]

Without a dataset it makes one of the size of ML-1M (6,040 users, about a million events). Batches
come through the grain iterator with two threads, as in training. The table counts windows for each
second of the clock and for each second of processor time. The second figure adds up all threads
and depends little on other programs. MiB is the memory of this process that no file backs
(RssAnon in /proc/self/status), less what it was before the dataset was opened.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tim4rec_jax.data import Dataset, TrainBatches, open_dataset
from tim4rec_jax.data import format as fmt
from tim4rec_jax.data.pipeline import train_iterator

CASES = ((50, 2048), (200, 256), (200, 2048))
SECONDS = 4.0


def write_ml1m_like(directory: Path) -> Path:
    """Writes a random dataset with the number of users, items and events of ML-1M."""
    rng = np.random.default_rng(0)
    n_users, n_items = 6040, 3416
    lengths = np.minimum(18 + rng.lognormal(4.36, 1.1, n_users).astype(np.int64), 2314)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    items = rng.integers(1, n_items + 1, offsets[-1], dtype=np.int32)
    passed = np.cumsum(rng.integers(0, 600, offsets[-1]))
    times = 950_000_000 + passed - np.repeat(passed[offsets[:-1]], lengths)

    schema = fmt.SEQUENCES_SCHEMA
    users = pa.array([str(user) for user in range(n_users)])
    item_lists = pa.ListArray.from_arrays(offsets, items, type=schema.field("items").type)
    time_lists = pa.ListArray.from_arrays(offsets, times, type=schema.field("timestamps").type)
    with pa.ipc.new_file(directory / fmt.sequences_file(), schema) as writer:
        writer.write(pa.record_batch([users, item_lists, time_lists], schema=schema))
    index = np.arange(1, n_items + 1)
    counts = np.bincount(items, minlength=n_items + 1)[1:]
    table = pa.table([index, list(map(str, index)), counts], schema=fmt.ITEMS_SCHEMA)
    pq.write_table(table, directory / fmt.ITEMS_FILE)
    values = (fmt.FORMAT_VERSION, "ml1m-like", "exact", 1, n_users, n_items, len(items))
    metadata = dict(zip(fmt.DATASET_KEYS, values, strict=True))
    (directory / fmt.DATASET_FILE).write_text(json.dumps(metadata))
    return directory


def anonymous_mib() -> float:
    """Returns the memory of this process that no file backs, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def report(dataset: Dataset, length: int, batch_size: int, buckets, before: float) -> str:
    """Returns a row of the table; `before` is the memory to subtract, in MiB."""
    batches = TrainBatches(
        dataset,
        max_length=length,
        batch_size=batch_size,
        seed=0,
        convention="recbole",
        buckets=buckets,
    )
    iterator = train_iterator(batches)
    peak, windows = 0.0, 0
    start, start_cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < start + SECONDS:
        windows += sum(len(batch["items"]) for batch in itertools.islice(iterator, 32))
        peak = max(peak, anonymous_mib())
    passed, passed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    iterator.close()
    return (
        f"{length:>4} {batch_size:>6}  {','.join(map(str, batches.buckets)):<20} "
        f"{batches.padding_share:>8.1%} {windows / passed:>10,.0f} {windows / passed_cpu:>10,.0f} "
        f"{peak - before:>6.0f}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a prepared dataset")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.dataset or write_ml1m_like(Path(scratch))
        before = anonymous_mib()
        start = time.perf_counter()
        dataset = open_dataset(directory)
        opened = time.perf_counter() - start
        size = f"{dataset.n_users:,} users, {dataset.n_events:,} events"
        print(f"{dataset.name}: {size}; opened and checked in {opened:.2f} s")
        print(f"   L  batch  {'buckets':<20}  padding  windows/s  per cpu-s    MiB")
        for length, batch_size in CASES:
            for buckets in ((length,), None):
                print(report(dataset, length, batch_size, buckets, before))


if __name__ == "__main__":
    main()
