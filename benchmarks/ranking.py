"""Measures full ranking by block size, and the same by sorting all scores: users/s and memory.

python -m benchmarks.ranking [--batch 2048] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from tim4rec_jax.evaluation.ranking import BLOCK_SIZE, ranks_and_ties, top_k

CATALOGUES = {"ML-1M": 3_416, "Amazon-Beauty": 12_101, "million": 1_000_000}
BLOCK_SIZES = (512, 1024, 2048)
WIDTH = 64
NAIVE_LIMIT = 2**31  # scores and sorted indices of the naive way must fit in memory


@jax.jit
def naive_ranks(hidden, table, targets):
    """Ranks by sorting the full score matrix, which `ranks_and_ties` replaces."""
    scores = jnp.matmul(hidden, table.T, precision=jax.lax.Precision.HIGHEST).at[:, 0].set(-jnp.inf)
    order = jnp.argsort(-scores, axis=1)
    return jnp.argmax(order == targets[:, None], axis=1).astype(jnp.int32) + 1


def measure(function, *args, repeats, **static):
    """Returns the seconds of the fastest of `repeats` calls, and bytes of temporaries."""
    compiled = function.lower(*args, **static).compile()
    arrays = [arg for arg in args if not isinstance(arg, int)]
    jax.block_until_ready(compiled(*arrays))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        seconds.append(time.perf_counter() - start)
    return min(seconds), compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2048, help="users ranked at once")
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()

    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((flags.batch, WIDTH), np.float32))
    report = Table(title=f"{flags.batch} users at once, D = {WIDTH}, {jax.devices()[0]}")
    for column in ("items", "method", "users/s", "temporaries, MB"):
        report.add_column(column, justify="left" if column == "method" else "right")

    def row(items, method, seconds, size):
        report.add_row(f"{items:,}", method, f"{flags.batch / seconds:,.0f}", f"{size / 1e6:,.0f}")

    for n_items in CATALOGUES.values():
        table = jnp.asarray(rng.standard_normal((n_items + 1, WIDTH), np.float32))
        targets = jnp.asarray(rng.integers(1, n_items + 1, flags.batch), jnp.int32)
        if flags.batch * n_items * 8 < NAIVE_LIMIT:
            row(n_items, "sort", *measure(naive_ranks, hidden, table, targets, repeats=1))
        for size in BLOCK_SIZES:
            label = f"count, blocks of {size}" + (" (default)" if size == BLOCK_SIZE else "")
            arguments = (hidden, table, targets)
            row(
                n_items,
                label,
                *measure(ranks_and_ties, *arguments, repeats=flags.repeats, block_size=size),
            )
        row(n_items, "top 10", *measure(top_k, hidden, table, 10, repeats=flags.repeats))
        report.add_section()
    Console().print(report)


if __name__ == "__main__":
    main()
