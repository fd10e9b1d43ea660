"""Prints test figures after each of the first epochs, beside those of the published code.

    python -m benchmarks.learning_curve data/ml-100k [--model tim4rec | no-time | sasrec]

This serves only to compare implementations, because a training run does not look at its test split
before the end. Prepare ml-100k with `--order recbole`. The settings are those of
`configs/ml100k.py`: histories of 50, batches of 256, Adam at 1e-3, seed 2020. The curve of the
published code was made with the same settings.
"""

import argparse
import time

from flax import nnx
from rich.console import Console
from rich.table import Table

from configs.ml100k import get_config
from tim4rec_jax import config as config_lib
from tim4rec_jax.data import TrainBatches, open_dataset
from tim4rec_jax.data.pipeline import train_iterator
from tim4rec_jax.evaluation import evaluate, standard_errors
from tim4rec_jax.models import build, inputs
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import StepSettings, train_step

# Test Hit@10, NDCG@10 of the published code after epochs 1, 2, ...
REFERENCE = {
    "tim4rec": [(0.1082, 0.0481), (0.1262, 0.0621), (0.1262, 0.0600), (0.1368, 0.0670)],
    "no-time": [(0.1103, 0.0490), (0.1347, 0.0617), (0.1273, 0.0611)],
    "sasrec": [(0.0997, 0.0451), (0.1177, 0.0528)],
}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning_curve", description=__doc__
    )
    parser.add_argument("dataset", help="ml-100k, prepared")
    parser.add_argument("--model", choices=REFERENCE, default="tim4rec", help="what to train")
    flags = parser.parse_args()
    enable_compilation_cache()

    config = get_config("sasrec" if flags.model == "sasrec" else "")
    if flags.model == "no-time":
        config.model.is_time = False
    config = config_lib.resolve(config)
    dataset = open_dataset(flags.dataset)
    windows = dict(max_length=config.data.max_length, convention=config.data.convention)
    batches = TrainBatches(dataset, batch_size=config.train.batch_size, seed=config.seed, **windows)
    model = build(
        config.model, n_items=dataset.n_items, max_length=config.data.max_length, seed=config.seed
    )
    graphdef, params = nnx.split(model)
    tx = make_optimizer(config.train.learning_rate, config.train.weight_decay)
    state = init_state(params, tx, config.seed)
    iterator = train_iterator(batches)
    reference, needed = REFERENCE[flags.model], (*inputs(model), "targets", "weights")
    table = Table("epoch", "Hit@10", "NDCG@10", "± s.e.", "reference", "seconds")
    for epoch in range(1, len(reference) + 1):
        start = time.perf_counter()
        for _ in range(batches.batches_per_epoch):
            batch = {name: v for name, v in next(iterator).items() if name in needed}
            state, _ = train_step(state, batch, StepSettings(graphdef, tx))
        trained = nnx.merge(graphdef, state.params)
        figures, ranks = evaluate(
            trained, dataset, "test", batch_size=config.eval.batch_size, **windows
        )
        errors = standard_errors(ranks[ranks > 0])
        hit, ndcg = reference[epoch - 1]
        table.add_row(
            str(epoch),
            f"{figures['hit@10']:.4f}",
            f"{figures['ndcg@10']:.4f}",
            f"{errors['hit@10']:.4f} / {errors['ndcg@10']:.4f}",
            f"{hit:.4f} / {ndcg:.4f}",
            f"{time.perf_counter() - start:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
