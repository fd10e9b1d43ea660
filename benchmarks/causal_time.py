r"""What each use of time, and each other change of the causal model, is worth on validation.

    python -m benchmarks.causal_time data/ml-100k --config ml100k:causal --seeds 2
    python -m benchmarks.causal_time data/ml-100k --config ml100k:causal --only "as it is" gates \
        --set data.shuffle_ties=True train.learning_rate=0.003

Trains a config as it is and once with each of `CANDIDATES`, and prints the validation figures of
the best epoch, as mean and range over the seeds. The best of many epochs is a lucky one, so the
mean of the last three epochs stands beside it. The test split decides nothing here, so it is not
printed. Every candidate begins as the model without it: what it adds is zero at first.

Findings are in docs/models.md. What was kept is part of the model: the gap changes the input, the
step size and the rate of decay.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from tim4rec_jax.commands.trainings import settings
from tim4rec_jax.layers import CausalBlock, FeedForward
from tim4rec_jax.layers.basic import Dense, dropout, fold
from tim4rec_jax.layers.time import KNOTS, GapModulation, GapModulator
from tim4rec_jax.models import tim4rec
from tim4rec_jax.run import read_validations
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.training import losses
from tim4rec_jax.training import train as training


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A change.

    Attributes:
      settings: what it sets, by full names.
      parts: replacements of names in the module of the model.
      smoothing: share of the target's probability that all items have equally in the loss.
      averaging: what is ranked is a mean of the weights at the ends of the epochs, in which each
        epoch counts this times what the next one does; 0: the weights as they are.
    """

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)
    smoothing: float = 0.0
    averaging: float = 0.0


def only(*uses: str) -> Candidate:
    """Sets all uses of the gap but these to zero."""

    class Only(GapModulator):
        def __call__(self, features):
            whole = super().__call__(features)._asdict()
            return GapModulation(
                **{name: x if name in uses else jnp.zeros_like(x) for name, x in whole.items()}
            )

    return Candidate(parts={"GapModulator": Only})


class GapNetworks(GapModulator):
    """Step and rate are smooth: each is a small network of the logarithm of the gap.

    As knots they are piecewise linear functions of it, so both can say much the same.
    """

    INNER = 8

    def __init__(self, width: int, heads: int, *, param_dtype: Any = jnp.float32):
        super().__init__(width, heads, param_dtype=param_dtype)
        # Hidden unit i turns at its own gap.
        self.centres = nnx.Param(jnp.linspace(0.0, 1.0, self.INNER, dtype=param_dtype))
        self.slopes = nnx.Param(jnp.full(self.INNER, 8.0, param_dtype))
        self.out = nnx.Param(jnp.zeros((self.INNER, 2 * heads), param_dtype))

    def __call__(self, features):
        """See `GapModulator`."""
        place = features @ jnp.linspace(0.0, 1.0, KNOTS, dtype=features.dtype)
        inner = jnp.tanh(self.slopes[...] * (place[..., None] - self.centres[...]))
        step, rate = jnp.split(inner @ self.out[...], 2, axis=-1)
        return GapModulation(super().__call__(features).inputs, step, rate)


class GatedFeedForward(FeedForward):
    """What the network adds is multiplied by 2 sigmoid(G h), see LiGR (arXiv 2502.03417)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, **kwargs):
        super().__init__(width, rngs=rngs, **kwargs)
        self.gate = zeros(width, rngs=rngs, **kwargs)

    def __call__(self, h, seeds=None):
        """See `FeedForward`."""
        inner = dropout(self.activation(self.fc1(h)), self.dropout_rate, fold(seeds, 0))
        y = self.fc2(inner) * (2 * jax.nn.sigmoid(self.gate(h)))
        return self.norm(dropout(y, self.dropout_rate, fold(seeds, 1)) + h)


class GatedBlock(CausalBlock):
    """What the layer adds is multiplied by 2 sigmoid(G h)."""

    def __init__(self, *args, width: int, **kwargs):
        super().__init__(*args, width=width, **kwargs)
        self.gate = zeros(width, **kwargs)

    def finish(self, y, h, seeds):
        """See `ResidualBlock`."""
        return super().finish(y * (2 * jax.nn.sigmoid(self.gate(h))), h, seeds)


def zeros(width: int, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs, **_) -> Dense:
    """A map that gives zeros at first."""
    kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    return Dense(width, width, kernel_init=nnx.initializers.zeros, **kwargs)


CANDIDATES = {
    "as it is": Candidate(),
    "no time": only(),
    "gap: inputs": only("inputs"),
    "gap: step": only("step"),
    "gap: rate": only("rate"),
    "gap: step + rate": only("step", "rate"),
    "gap: networks": Candidate(parts={"GapModulator": GapNetworks}),
    "gates": Candidate(parts={"CausalBlock": GatedBlock, "FeedForward": GatedFeedForward}),
    "bands": Candidate({"model.band_events": 5}),
    "label smoothing .1": Candidate(smoothing=0.1),
    "averaged weights": Candidate(averaging=0.7),
    "4 layers": Candidate({"model.num_layers": 4}),
    "width 128": Candidate({"model.hidden_size": 128, "model.dropout_prob": 0.35}),
    "learning rate .003": Candidate({"train.learning_rate": 3e-3}),
    "ties": Candidate({"data.shuffle_ties": True}),
    "ties, learning rate .003": Candidate({"data.shuffle_ties": True, "train.learning_rate": 3e-3}),
}


@contextmanager
def in_use(candidate: Candidate) -> Iterator[None]:
    """Models that are built and trained meanwhile have the candidate's parts and its loss."""
    plain, rank, mean = losses.full_cross_entropy, training.evaluate, None

    def smoothed(hidden, table, targets, weights, history=None):
        difference = jnp.einsum("nd,nd->n", hidden, table[targets] - table[1:].mean(0))
        penalty = candidate.smoothing * jnp.sum(weights * difference)
        return plain(hidden, table, targets, weights, history) + penalty

    def averaged(model, *args, **kwargs):
        nonlocal mean
        graphdef, params = nnx.split(model)
        keep = candidate.averaging if mean is not None else 0.0
        mean = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, mean or params, params)
        return rank(nnx.merge(graphdef, mean), *args, **kwargs)

    with ExitStack() as stack:
        for name, part in candidate.parts.items():
            stack.enter_context(mock.patch.object(tim4rec, name, part))
        if candidate.smoothing:
            stack.enter_context(mock.patch.object(losses, "full_cross_entropy", smoothed))
        if candidate.averaging:
            stack.enter_context(mock.patch.object(training, "evaluate", averaged))
        jax.clear_caches()  # a compiled step is found by its settings, which say nothing of these
        yield


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.causal_time", description=__doc__)
    parser.add_argument("dataset", help="a prepared dataset")
    parser.add_argument("--config", required=True, help="a config with causal time")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="settings of all trainings"
    )
    flags = parser.parse_args()
    enable_compilation_cache()

    table = Table(title=f"{flags.dataset}, {flags.config}: validation", title_justify="left")
    headings = ("change", "Hit@10", "NDCG@10", "range", "last epochs", "best epochs", "CPU s")
    for name in headings:
        table.add_column(name, no_wrap=True)
    for name in flags.only:
        runs, last, began = [], [], time.process_time()
        for seed in range(2020, 2020 + flags.seeds):
            words = {"dataset": flags.dataset, "seed": seed, **CANDIDATES[name].settings}
            words |= {"train.epochs": flags.epochs} if flags.epochs else {}
            changes = [*(f"{key}={value}" for key, value in words.items()), *flags.set]
            config = settings([f"--config={flags.config}", *(f"--config.{c}" for c in changes)])
            with tempfile.TemporaryDirectory() as folder, in_use(CANDIDATES[name]):
                runs.append(training.train(config, Path(folder)))
                last += [each["ndcg@10"] for each in read_validations(Path(folder))[-3:]]
        ndcg = [run["valid"]["ndcg@10"] for run in runs]
        table.add_row(
            name,
            f"{statistics.mean(run['valid']['hit@10'] for run in runs):.4f}",
            f"{statistics.mean(ndcg):.4f}",
            f"{min(ndcg):.4f}-{max(ndcg):.4f}",
            f"{statistics.mean(last):.4f}",
            ", ".join(str(run["best_epoch"]) for run in runs),
            f"{(time.process_time() - began) / flags.seeds:.0f}",
        )
    Console(width=max(100, Console().width)).print(table)


if __name__ == "__main__":
    main()
