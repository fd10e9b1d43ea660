"""Shows where the time of a training step goes.

    python -m benchmarks.train_step                       # steps on random batches
    python -m benchmarks.train_step --epoch data/beauty --config configs/beauty.py

The first command prints the step as trained for the released Beauty and ML-1M shapes, and the step
with one thing changed at a time. The share of a thing is the time that is saved without it. The
second command times whole epochs on a prepared dataset, as `train.py` runs them, with the data
pipeline.

The columns are seconds of wall clock and processor time (all cores), page faults, and memory that
XLA allocates for temporaries. Each is the median of the runs, for one step. On a GPU or TPU a run
is several steps dispatched one after the other, because training does not wait for a step.
"""

import argparse
import resource
import runpy
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from tim4rec_jax import config as config_lib
from tim4rec_jax.data import open_dataset, train_dates
from tim4rec_jax.models import build
from tim4rec_jax.runtime import data_sharding, keep_bits
from tim4rec_jax.training.dispatch import make_steps
from tim4rec_jax.training.inputs import make_batches
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import StepSettings, num_microbatches, train_step

# name: config file, rows, items, and seconds for a step of the published code: on two cores (torch
# 2.13 with an allocator that keeps its memory, minimum of 5), and as others measured on an H200.
CASES = {
    "Beauty, B 2048, L 50": ("configs/beauty.py", 2048, 12_101, {"cpu": 2.44, "gpu": 0.026}),
    "ML-1M, B 256, L 200": ("configs/ml1m.py", 256, 3_416, {"cpu": 0.96}),
}


def load(named: str):
    """Returns the settings of a config, FILE.py[:VARIANT]."""
    path, _, variant = named.partition(":")
    return runpy.run_path(path)["get_config"](variant)


def random_batch(rows: int, length: int, n_items: int, seed: int = 0) -> dict:
    """Returns a batch of random histories of full length."""
    rng = np.random.default_rng(seed)
    batch = {
        "items": rng.integers(1, n_items + 1, (rows, length), np.int32),
        "lengths": np.full(rows, length, np.int32),
        "gaps": rng.exponential(1e5, (rows, length)).astype(np.float32),
        "targets": rng.integers(1, n_items + 1, rows, np.int32),
        "weights": np.ones(rows, np.float32),
    }
    return jax.device_put(batch)


def measure(step, state, runs: int) -> tuple[float, float, float]:
    """Returns medians of wall seconds, processor seconds and page faults of `step(state)`."""
    state = jax.block_until_ready(step(state))
    together = 1 if jax.default_backend() == "cpu" else 16
    figures = []
    for _ in range(runs):
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(together):
            state = step(state)
        jax.block_until_ready(state)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        figures.append([figure / together for figure in (wall, cpu, faults)])
    return tuple(statistics.median(column) for column in zip(*figures, strict=True))


def train_stepper(config, rows: int, n_items: int, microbatches: int | None = None):
    """Returns (step, state, MB of temporaries) of training as `train.py` does it."""
    length = config.data.max_length
    model = build(config.model, n_items=n_items, max_length=length)
    graphdef, params = nnx.split(model)
    tx = make_optimizer(config.train.learning_rate, 0.0)
    batch = random_batch(rows, length, n_items)
    settings = StepSettings(graphdef, tx, num_microbatches=microbatches)
    state = init_state(params, tx, 0)
    analysis = train_step.lower(state, batch, settings).compile().memory_analysis()
    return (
        lambda state: train_step(state, batch, settings)[0],
        state,
        analysis.temp_size_in_bytes / 1e6,
    )


def matrix_products(config, rows: int, n_items: int):
    """Returns (step, state, FLOPs) of the dense products alone, forward and backward.

    These are the projections of both layers, the feed-forward networks and the scores, in the
    shapes of one micro-batch. The output side of the last layer has one position.
    """
    model, length = config.model, config.data.max_length
    width, inner = model.hidden_size, model.hidden_size * model.expand
    mixed = inner + 2 * model.d_state + inner // model.head_dim
    micro = num_microbatches(rows, length, 1)
    tokens, ends = rows * length // micro, rows // micro
    last = [(ends, width, inner), (ends, inner, width)]
    last += [(ends, width, 4 * width), (ends, 4 * width, width), (ends, width, n_items + 1)]
    full = [(tokens, width, mixed), (tokens, width, inner + mixed), (tokens, inner, width)]
    full += [(tokens, width, 4 * width), (tokens, 4 * width, width)]
    shapes = full + last
    x = [jnp.ones((m, k)) for m, k, _ in shapes]
    w = [jnp.ones((k, n)) for _, k, n in shapes]
    dy = [jnp.ones((m, n)) for m, _, n in shapes]

    @jax.jit
    def step(carry):
        def one(carry, _):
            # Each result changes the carry, so XLA can neither drop nor hoist a product.
            for i in range(len(shapes)):
                a, b, c = x[i] + carry, w[i] + carry, dy[i] + carry
                carry += 1e-30 * ((a @ b)[0, 0] + (c @ b.T)[0, 0] + (a.T @ c)[0, 0])
            return carry, None

        return jax.lax.scan(one, carry, None, length=micro)[0]

    flops = 6.0 * micro * sum(m * k * n for m, k, n in shapes)
    return step, jnp.zeros(()), flops


def steps(console: Console, runs: int) -> None:
    """Prints the table of steps."""
    on_cpu = jax.default_backend() == "cpu"  # there the clock counts other programs as well
    for name, (path, rows, n_items, references) in CASES.items():
        config = load(path)
        variants = {"as trained": {}, "one micro-batch": {"microbatches": 1}}
        changes = {
            "without dropout": {"dropout_prob": 0.0, "time_drop_out": 0.0},
            "without time": {"is_time": False},
            "without feed-forward": {"is_ffn": False},
        }
        table = Table("step", title=f"{name}, {n_items:,} items, {jax.devices()[0].device_kind}")
        for heading in ("wall s", "cpu s", "faults", "temp MB", "samples/s", "tokens/s", "share"):
            table.add_column(heading, justify="right")
        whole = 0.0
        for label in (*variants, *changes):
            changed = load(path)
            changed.model.update(changes.get(label, {}))
            step, state, temporaries = train_stepper(
                changed, rows, n_items, **variants.get(label, {})
            )
            wall, cpu, faults = measure(step, state, runs)
            spent = cpu if on_cpu else wall
            whole = whole or spent
            share = f"{1 - spent / whole:.0%}" if label in changes else ""
            table.add_row(
                label,
                f"{wall:.4f}",
                f"{cpu:.4f}",
                f"{faults:,.0f}",
                f"{temporaries:,.0f}",
                f"{rows / wall:,.0f}",
                f"{rows * config.data.max_length / wall:,.0f}",
                share,
            )
            if label == "as trained":
                trained = wall
        step, state, flops = matrix_products(config, rows, n_items)
        wall, cpu, _ = measure(step, state, runs)
        rate = f"{flops / wall / 1e9:,.0f} GFLOP/s"
        label = "matrix products alone"
        spent = cpu if on_cpu else wall
        share = f"{spent / whole:.0%}"
        table.add_row(label, f"{wall:.4f}", f"{cpu:.4f}", "", "", rate, "", share)
        console.print(table)
        if reference := references.get(jax.default_backend()):
            times = f"{reference / trained:.2f} times as long"
            console.print(f"the reference's step took {reference} s: {times}\n")


def start_training(config, directory: str):
    """Returns the batches, the steps and the first state of a training as `train.py` runs it."""
    config = config_lib.resolve(config)
    data = config.data
    dataset = open_dataset(directory).split(data.split, data.valid_from, data.test_from)
    batches = make_batches(config, dataset)
    model = build(
        config.model,
        n_items=dataset.n_items,
        n_users=dataset.n_users,
        max_length=data.max_length,
        date_range=train_dates(dataset) if config.model.date_bias_knots else None,
    )
    placement = data_sharding(config.train.batch_size)
    steps = make_steps(config, batches, model, placement)
    state = init_state(nnx.state(model), steps.settings.tx, config.seed)
    return batches, steps, jax.device_put(state, placement.replicated)


def epochs(console: Console, directory: str, named: str, batch: int, count: int) -> None:
    """Times whole epochs as `train.py` runs them; the first one includes compilation."""
    config = load(named)
    config.train.batch_size = batch or config.train.batch_size
    batches, steps, state = start_training(config, directory)
    console.print(f"{batches.dataset.name}: {batches.n_targets:,} samples", end=", ")
    console.print(f"{batches.batches_per_epoch} batches, {type(steps).__name__}")
    for epoch in range(count + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches.batches_per_epoch):
            state, _ = steps.run(state)
        jax.block_until_ready(state)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        note = " (compiling included)" if epoch == 0 else ""
        console.print(
            f"epoch {epoch}: {wall:.1f} s wall, {cpu:.1f} s cpu, "
            f"{batches.n_targets / wall:,.0f} samples/s{note}"
        )
    # None on CPU.
    if memory := jax.devices()[0].memory_stats():
        console.print(f"peak memory {memory['peak_bytes_in_use'] / 1e6:,.0f} MB")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.add_argument("--epoch", metavar="DIR", help="time epochs on this prepared dataset")
    parser.add_argument(
        "--config", default="configs/beauty.py", help="settings for --epoch, FILE[:VARIANT]"
    )
    parser.add_argument("--batch", type=int, default=0, help="its size (default: the config's)")
    parser.add_argument("--runs", type=int, default=5, help="steps or epochs to measure")
    flags = parser.parse_args()
    keep_bits()  # as `train.py` does
    console = Console()
    if flags.epoch:
        epochs(console, flags.epoch, flags.config, flags.batch, flags.runs)
    else:
        steps(console, flags.runs)


if __name__ == "__main__":
    main()
