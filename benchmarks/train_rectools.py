"""Times the training of SASRec on a CPU: this package beside RecTools, for one target.

    python -m benchmarks.train_rectools data/ml-100k --rectools rectools/bin/python

Both train the same size of model on the same events: 64 features, 2 layers of 2 heads, a
feed-forward network of 256, the full cross-entropy at every position, and batches of as many rows
of the same length. Both leave out the last two events of each user. RecTools keeps the last events
of a user that fill one row; this package packs all of them into rows. So a target is what can be
compared, and the tables count targets. Neither side validates.

Each side is a process of its own that may use one core. The seconds are those of the processor for
an epoch, the median of those after the first one, which compiles.
"""

import argparse
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

WIDTH, LAYERS, HEADS, INNER, DROPOUT = 64, 2, 2, 256, 0.2
SIDES = ("ours", "rectools")


def ours(directory: str, length: int, rows: int, epochs: int):
    """Yields targets and processor seconds of each epoch of this package."""
    import jax

    from benchmarks.train_step import start_training
    from tim4rec_jax.presets import load_config

    config = load_config("ml100k:sasrec")
    config.data.max_length = length
    config.data.buckets = (length,)
    config.train.update(objective="every_position", batch_size=rows)
    config.model.update(hidden_size=WIDTH, n_layers=LAYERS, n_heads=HEADS, inner_size=INNER)
    config.model.update(hidden_dropout_prob=DROPOUT, attn_dropout_prob=DROPOUT)
    batches, steps, state = start_training(config, directory)
    for _ in range(epochs):
        start = time.process_time()
        for _ in range(batches.batches_per_epoch):
            state, _ = steps.run(state)
        jax.block_until_ready(state)
        yield batches.n_targets, time.process_time() - start


def rectools(log: str, length: int, rows: int, epochs: int):
    """Yields targets and processor seconds of each epoch of RecTools; it needs no JAX."""
    import pandas as pd
    import torch
    from pytorch_lightning import Callback, Trainer
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel
    from rectools.models.nn.item_net import IdEmbeddingsItemNet
    from rectools.models.nn.transformers.net_blocks import PreLNTransformerLayers

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ends: list[float] = []

    class Clock(Callback):
        def on_train_epoch_start(self, trainer, module):
            ends[:] = ends or [time.process_time()]

        def on_train_epoch_end(self, trainer, module):
            ends.append(time.process_time())

    events = pd.read_csv(log).assign(weight=1.0)
    SASRecModel(
        **{"n_factors": WIDTH, "n_blocks": LAYERS, "n_heads": HEADS, "dropout_rate": DROPOUT},
        **{"session_max_len": length, "batch_size": rows, "epochs": epochs, "loss": "softmax"},
        # Layers with a feed-forward network four times as wide, as this package's have.
        transformer_layers_type=PreLNTransformerLayers,
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_trainer_func=lambda: Trainer(
            **{"max_epochs": epochs, "min_epochs": epochs, "callbacks": [Clock()]},
            **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
            **{"enable_model_summary": False, "accelerator": "cpu"},
        ),
    ).fit(Dataset.construct(events))
    counts = events.groupby("user_id").size()
    targets = int((counts.clip(upper=length + 1) - 1).sum())
    for start, end in itertools.pairwise(ends):
        yield targets, end - start


def write_log(directory: str, path: Path) -> None:
    """Writes the training events of a prepared dataset as a CSV, in their order."""
    import numpy as np
    import pandas as pd

    from tim4rec_jax.data import open_dataset

    dataset = open_dataset(directory)  # the last two events of a user are not for training
    items = np.concatenate([chunk.items for chunk in dataset.chunks])
    users = np.repeat(np.arange(dataset.n_users), dataset.lengths)
    number = np.arange(len(users)) - dataset.offsets[users]
    log = pd.DataFrame({"user_id": users, "item_id": items, "datetime": number})
    log[number < dataset.splits.train[users]].to_csv(path, index=False)


def measure(python: str, *words: object) -> tuple[int, float]:
    """Runs one side on one core: targets of an epoch, and its processor seconds."""
    core = min(os.sched_getaffinity(0))
    done = subprocess.run(
        [python, "-m", "benchmarks.train_rectools", *map(str, words)],
        **{"stdout": subprocess.PIPE, "text": True, "check": True},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    epochs = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return epochs[0][0], statistics.median(seconds for _, seconds in epochs[1:])


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", help="a prepared dataset; with --side rectools, a CSV")
    parser.add_argument("--rectools", metavar="PYTHON", help="one with `rectools[torch]==0.19.0`")
    parser.add_argument("--lengths", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128], help="of a batch")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        run = {"ours": ours, "rectools": rectools}[flags.side]
        for epoch in run(flags.dataset, flags.lengths[0], flags.rows[0], flags.epochs):
            print(json.dumps(epoch), flush=True)
        return
    print("length  rows  side      targets  processor s  us a target  RecTools / ours", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        write_log(flags.dataset, log)
        sources = {"ours": (sys.executable, flags.dataset)}
        if flags.rectools:
            sources["rectools"] = flags.rectools, log
        for length, rows in itertools.product(flags.lengths, flags.rows):
            cost = {}
            for side, (python, source) in sources.items():
                sizes = ("--lengths", length, "--rows", rows, "--epochs", flags.epochs)
                targets, seconds = measure(python, source, "--side", side, *sizes)
                cost[side] = 1e6 * seconds / targets
                ratio = f"{cost[side] / cost['ours']:.2f}" if side == "rectools" else ""
                print(
                    f"{length:6}  {rows:4}  {side:8}  {targets:7,}  {seconds:11.2f}  "
                    f"{cost[side]:11.1f}  {ratio:>15}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
