"""Measures serving: time for one more event of a user, recommendations per second by catalogue.

python -m benchmarks.serving [--catalogues 10000,1000000] [--seconds 3]

The model is a causal TiM4Rec with the settings of the released 64-d model and random weights. Speed
does not depend on the weights. But the share of items that an approximate index finds does, because
random items have no similar items. `--workdir RUN` takes the trained model of a run instead.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from rich.console import Console
from rich.table import Table

from tim4rec_jax import config as config_lib
from tim4rec_jax.data import format as fmt
from tim4rec_jax.models import build
from tim4rec_jax.serving import MemoryStore, Recommender, SQLiteStore
from tim4rec_jax.serving.ann_index import ApproximateIndex
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import CompiledModel

LENGTH = 50
BATCHES = (1, 1024)  # users with one more event each
HISTORIES = (1, 256)  # histories in one call


def make(folder: Path, n_items: int) -> tuple[Recommender, nnx.Module]:
    """Returns a recommender over `n_items` items, and its model."""
    indices = np.arange(1, n_items + 1, dtype=np.int32)
    columns = [indices, [str(index) for index in indices.tolist()], indices.astype(np.int64)]
    pq.write_table(pa.table(columns, schema=fmt.ITEMS_SCHEMA), folder / fmt.ITEMS_FILE)
    values = (fmt.FORMAT_VERSION, "benchmark", "exact", 1, 1, n_items, 1)
    metadata = dict(zip(fmt.DATASET_KEYS, values, strict=True))
    (folder / fmt.DATASET_FILE).write_text(json.dumps(metadata))
    config = config_lib.default()
    config.dataset, config.data.max_length = str(folder), LENGTH
    config.model.time_encoding = "causal"
    config = config_lib.resolve(config)
    model = build(config.model, n_items=n_items, max_length=LENGTH)
    catalogue = Catalogue(folder)
    return Recommender(CompiledModel(config, model, catalogue.ids), catalogue), model


def measure(call: Callable[[], object], seconds: float) -> float:
    """Returns the median seconds of at least three calls."""
    call()
    taken = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def step_alone(model: nnx.Module, batch: int) -> Callable[[], object]:
    """Returns a call of the model's step; the state stays on the device."""
    graphdef, params = nnx.split(model)
    step = jax.jit(lambda params, *args: nnx.merge(graphdef, params).step(*args), donate_argnums=1)
    state = model.init_state(batch)
    items, gaps = np.ones(batch, np.int32), np.full(batch, 60, np.float32)

    def call():
        nonlocal state
        state, hidden = step(params, state, items, gaps)
        hidden.block_until_ready()

    return call


def updates(recommender: Recommender, batch: int) -> Callable[[], object]:
    """Returns a call that adds one event to each of `batch` users of the store."""
    clock = 0

    def call():
        nonlocal clock
        clock += 60
        recommender.update_batch([(user, 1 + clock % 1000, clock) for user in range(batch)])

    return call


def streaming(folder: Path, recommender: Recommender, model: nnx.Module, seconds: float) -> Table:
    """Returns the table of times for one more event of each user."""
    table = Table(title=f"one more event of each user, {jax.devices()[0]}")
    for column in ("users at once", "", "µs per event", "events/s"):
        table.add_column(column, justify="right" if column else "left")
    for batch in BATCHES:
        ways = {"model.step alone": step_alone(model, batch)}
        sqlite = SQLiteStore(folder / f"{batch}.db")
        for name, store in (
            ("update, MemoryStore", MemoryStore()),
            ("update, SQLiteStore", sqlite),
        ):
            stored = Recommender(recommender.model, recommender.catalogue, store)
            ways[name] = updates(stored, batch)
        for name, call in ways.items():
            per_event = measure(call, seconds) / batch
            table.add_row(f"{batch:,}", name, f"{per_event * 1e6:,.1f}", f"{1 / per_event:,.0f}")
        sqlite.close()
        table.add_section()
    return table


def recommending(recommender: Recommender, batch: int) -> Callable[[], list]:
    """Returns a call that recommends to `batch` histories and leaves out their own items."""
    rng = np.random.default_rng(0)
    ids = np.array(recommender.catalogue.ids)
    items = ids[rng.integers(0, len(ids), (batch, LENGTH))].tolist()
    times = np.sort(rng.integers(0, 10**6, (batch, LENGTH)), axis=1)
    histories = list(zip(items, times, strict=True))
    return lambda: recommender.recommend_batch(histories, k=10)


def compare(table: Table, exact: Recommender, seconds: float) -> None:
    """Adds rows for exact search and for an index, with the share of items that the index found."""
    began = time.perf_counter()
    index = ApproximateIndex(exact.model.table)
    built = time.perf_counter() - began
    ways = {
        "exact": exact,
        f"index (made in {built:.1f} s)": Recommender(exact.model, exact.catalogue, index=index),
    }
    for batch in HISTORIES:
        wanted = [set(one.items) for one in recommending(exact, batch)()]
        for name, recommender in ways.items():
            call = recommending(recommender, batch)
            hits = [len(w & set(one.items)) for w, one in zip(wanted, call(), strict=True)]
            taken = measure(call, seconds)
            table.add_row(
                f"{len(exact.catalogue):,}",
                f"{batch:,}",
                name,
                f"{taken * 1e3:,.1f}",
                f"{batch / taken:,.0f}",
                f"{sum(hits) / sum(map(len, wanted)):.3f}",
            )
    table.add_section()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--catalogues", default="10000,1000000", help="numbers of items")
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on each figure")
    parser.add_argument("--workdir", type=Path, help="of a run: only recommend from its catalogue")
    flags = parser.parse_args()
    console = Console()
    table = Table(title=f"top 10 of all items for histories of {LENGTH} events")
    for column in ("items", "histories at once", "", "ms per call", "recommendations/s", "found"):
        table.add_column(column, justify="right" if column else "left")
    if flags.workdir:
        compare(table, Recommender.load(flags.workdir), flags.seconds)
        console.print(table)
        return
    for number, n_items in enumerate(map(int, flags.catalogues.split(","))):
        with tempfile.TemporaryDirectory() as folder:
            recommender, model = make(Path(folder), n_items)
            if not number:
                console.print(streaming(Path(folder), recommender, model, flags.seconds))
        compare(table, recommender, flags.seconds)
    console.print(table)


if __name__ == "__main__":
    main()
