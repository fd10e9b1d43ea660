"""What `eval.py` does: opens a run and its dataset, evaluates, prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from tim4rec_jax import compilation_cache
from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.loop import Split, batch_settings, evaluate
from tim4rec_jax.evaluation.metrics import standard_errors
from tim4rec_jax.evaluation.predictions import write_predictions
from tim4rec_jax.evaluation.report import print_report, write_csv, write_json
from tim4rec_jax.evaluation.slices import SLICES, sliced_metrics
from tim4rec_jax.training.checkpoints import load_best


def evaluate_run(
    workdir: Path,
    *,
    dataset: Path | None = None,
    split: Split = "test",
    exclude_seen: bool = False,
    by: Sequence[str] = (),
    json: Path | None = None,
    csv: Path | None = None,
    predictions: Path | None = None,
    top_k: int = 10,
) -> dict:
    """Evaluates the best checkpoint of a run; prints tables and writes the files asked for.

    Args:
        workdir: of the run.
        dataset: a prepared dataset; `None` takes the one of the training.
        split: `"valid"` or `"test"`.
        exclude_seen: items the user has had do not compete, and are not predicted.
        by: slices, see `tim4rec_jax.evaluation.slices`.
        json: where the report goes; `None`: `eval_<split>.json` in `workdir`.
        csv: where the figures go as a table, one per line.
        predictions: where the best items of every user go.
        top_k: how many of them.

    Returns:
        The report, as `tim4rec_jax.evaluation.report` describes it.

    Raises:
        UserError: the run or the dataset is missing, damaged or of another kind, or a file
            cannot be written.
    """
    if unknown := [name for name in by if name not in SLICES]:
        raise UserError(f"slices are {', '.join(SLICES)}, and {unknown[0]!r} is none of them")
    config: Any
    compilation_cache.enable()
    config, model = load_best(workdir)
    data = config.data
    ds = open_dataset(dataset or config.dataset).split(data.split, data.valid_from, data.test_from)
    check_model(model, ds.n_items, ds.directory, workdir)
    settings: dict[str, Any] = batch_settings(config)
    settings |= {"exclude_seen": exclude_seen, "progress": True}
    figures, ranks = evaluate(model, ds, split, **settings)
    report = {
        "workdir": str(workdir),
        "dataset": ds.name,
        "split": split,
        "exclude_seen": exclude_seen,
        "users": int((ranks > 0).sum()),
        "metrics": figures,
        "standard_errors": standard_errors(ranks[ranks > 0]),
        "slices": {name: sliced_metrics(ds, split, ranks, name) for name in by},
    }
    if "oracle" in ds.metadata and data.split == "leave_one_out" and not exclude_seen:
        report["oracle"] = ds.metadata["oracle"][split]
    console = Console()
    print_report(report, console)
    suffix = "_exclude_seen" if exclude_seen else ""
    json = json or workdir / f"eval_{split}{suffix}.json"
    write_json(report, json)
    written = [json]
    if csv:
        write_csv(report, csv)
        written.append(csv)
    if predictions:
        write_predictions(predictions, model, ds, split, top_k, **settings)
        written.append(predictions)
    console.print("wrote", *written, soft_wrap=True)
    return report


def check_model(model: Any, n_items: int, dataset: Path, workdir: Path) -> None:
    """Makes sure that a run's model can score the items of a dataset.

    Raises:
        UserError: the weights are not finite, or belong to another number of items.
    """
    # By numpy: JAX would compile a program for every shape.
    params = jax.device_get(nnx.state(model, nnx.Param))
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise UserError(f"{workdir}: the weights are not finite, the training has diverged")
    if model.n_items != n_items:
        raise UserError(
            f"{workdir} was trained on {model.n_items} items and {dataset} has {n_items}; name "
            "the dataset of the training with --dataset, or train anew"
        )
