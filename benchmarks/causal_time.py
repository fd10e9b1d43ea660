"""What each use of the gaps is worth: the study behind `time_encoding="causal"`.

    python -m benchmarks.causal_time data/ml-100k --config configs/ml100k.py:causal --seeds 2

Trains a config with combinations of the parts of `tim4rec_jax.layers.time.GapModulation`. Prints
validation figures of the best epoch, as mean and range over the seeds. The test split decides
nothing here, so it is not printed. `rate` is a function of the gap that is piecewise linear in
the logarithm of the gap. A decay by elapsed time, exp(-lambda gap), is a special case of it.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.train_step import load
from tim4rec_jax.layers.time import GapModulation, GapModulator
from tim4rec_jax.models import causal_tim4rec
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.training.train import train

PARTS = [(), ("inputs",), ("step",), ("rate",), ("step", "rate"), ("inputs", "step", "rate")]


def only(parts: tuple[str, ...]) -> type[GapModulator]:
    """Returns a modulator that sets all parts but these to zero."""

    class Only(GapModulator):
        def __call__(self, features):
            whole = super().__call__(features)._asdict()
            return GapModulation(
                **{name: x if name in parts else jnp.zeros_like(x) for name, x in whole.items()}
            )

    return Only


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.causal_time", description=__doc__)
    parser.add_argument("dataset", help="a prepared dataset")
    parser.add_argument("--config", required=True, help="FILE.py[:VARIANT] with causal time")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    flags = parser.parse_args()
    enable_compilation_cache()

    table = Table(title=f"{flags.dataset}, {flags.config}: validation", title_justify="left")
    for name in ("uses of the gap", "Hit@10", "NDCG@10", "range", "best epochs", "seconds"):
        table.add_column(name, no_wrap=True)
    for parts in PARTS:
        causal_tim4rec.GapModulator = only(parts)
        runs, began = [], time.perf_counter()
        for seed in range(2020, 2020 + flags.seeds):
            config = load(flags.config)
            config.dataset, config.seed = flags.dataset, seed
            config.train.epochs = flags.epochs or config.train.epochs
            with tempfile.TemporaryDirectory() as folder:
                runs.append(train(config, Path(folder)))
        ndcg = [run["valid"]["ndcg@10"] for run in runs]
        table.add_row(
            " + ".join(parts) or "none",
            f"{statistics.mean(run['valid']['hit@10'] for run in runs):.4f}",
            f"{statistics.mean(ndcg):.4f}",
            f"{min(ndcg):.4f}-{max(ndcg):.4f}",
            ", ".join(str(run["best_epoch"]) for run in runs),
            f"{(time.perf_counter() - began) / flags.seeds:.0f}",
        )
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
