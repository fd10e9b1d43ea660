"""What `eval.py` does: evaluates a run, prints a report and writes it to files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32
from rich.console import Console

from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data.format import DATASET_FILE
from tim4rec_jax.data.splits import Split
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import ranking
from tim4rec_jax.evaluation.evaluate import (
    batch_settings,
    judge_lists,
    rank_targets,
    write_predictions,
)
from tim4rec_jax.evaluation.metrics import (
    SLICES,
    TIES,
    Ties,
    metrics,
    sliced_metrics,
    standard_errors,
    tested,
)
from tim4rec_jax.evaluation.protocol import best_epoch, protocol
from tim4rec_jax.evaluation.report import print_report, write_csv
from tim4rec_jax.files import atomic_write, write_json
from tim4rec_jax.run import check_model, check_same_dataset, load_model
from tim4rec_jax.runtime import check_memory, enable_compilation_cache

# The table that `--ranks` asks for.
RANKS = pa.schema([("user", pa.string()), ("rank", pa.int32()), ("ties", pa.int32())])


def evaluate_run(
    workdir: Path,
    *,
    dataset: Path | None = None,
    split: Split = "test",
    exclude_seen: bool = False,
    ks: Sequence[int] | None = None,
    ties: Ties | None = None,
    accuracy_only: bool = False,
    by: Sequence[str] = (),
    json: Path | None = None,
    csv: Path | None = None,
    ranks: Path | None = None,
    predictions: Path | None = None,
    top_k: int = 10,
) -> dict:
    """Evaluates the best checkpoint of a run, prints a report and writes the files asked for.

    Args:
        workdir: the run directory.
        dataset: a prepared dataset; `None` takes the dataset of the training.
        split: `"valid"` or `"test"`.
        exclude_seen: whether the items of a user's history are left out, of the ranking and of the
            lists.
        ks: the cut-offs k; `None` takes those of the settings.
        ties: whether figures are `"optimistic"` or `"expected"`, see
            `tim4rec_jax.evaluation.metrics.per_user`; `None` takes that of the settings.
        accuracy_only: whether coverage, novelty and so on are left out.
        by: the slices to report, of `tim4rec_jax.evaluation.metrics.SLICES`.
        json: the file for the report; `None` takes `eval_<split>.json` in `workdir`, or
            `eval_<split>_exclude_seen.json`.
        csv: the file for the figures as a table, one figure per line; `None` writes none.
        ranks: the Parquet file for the rank and the ties of every user's target, in columns
            `user`, `rank` and `ties`; `None` writes none.
        predictions: the file for the best items of every user; `None` writes none.
        top_k: the number of predictions per user.

    Returns:
        The report, as `tim4rec_jax.evaluation.report` describes it.

    Raises:
        UserError: the run or the dataset is missing, damaged or of another kind, a slice is
            unknown, or a file cannot be written.
    """
    if unknown := [name for name in by if name not in SLICES]:
        raise UserError(f"slices are {', '.join(SLICES)}, and {unknown[0]!r} is none of them")
    report_file = json or (workdir / f"eval_{split}{'_exclude_seen' if exclude_seen else ''}.json")
    outputs = [path for path in (ranks, predictions, csv, report_file) if path]
    _check_outputs(outputs, workdir)
    enable_compilation_cache()
    config: Any
    config, model = load_model(workdir)
    data = config.data
    ks, rule = tuple(ks or config.eval.ks), ties or config.eval.ties
    ds = open_dataset(dataset or config.dataset).split(data.split, data.valid_from, data.test_from)
    check_model(model, ds.n_items, ds.directory, workdir)
    check_same_dataset(ds.directory, ds.metadata, workdir)
    options: dict[str, Any] = dict(exclude_seen=exclude_seen, progress=True)
    options |= batch_settings(config)
    size, length = config.eval.batch_size, data.max_length
    check_memory(
        f"batches of {size:,} users with {length:,} events",
        4 * size * (2 * ranking.BLOCK_SIZE + 4 * length),
        f"set a smaller eval.batch_size in {workdir / 'config.json'}",
    )
    found, equal = rank_targets(model, ds, split, **options)
    by_ties = {how: tested(found, equal, how) for how in TIES}
    best, tied = by_ties[rule]
    report = {
        "workdir": str(workdir),
        "dataset": ds.name,
        "content": ds.metadata["content"],
        "split": split,
        "exclude_seen": exclude_seen,
        "protocol": protocol(config, ds, part=split, exclude_seen=exclude_seen, ties=rule, ks=ks),
        "epoch": best_epoch(workdir),
        "users": len(best),
        "metrics": metrics(best, ks, tied),
        "standard_errors": standard_errors(best, ks, tied),
        "by_ties": {how: metrics(of, ks, equals) for how, (of, equals) in by_ties.items()},
        "not_a_number": int((best == ranking.UNRANKED).sum()),
        "slices": {
            name: sliced_metrics(
                ds, split, found, name, ks=ks, ties=equal if rule == "expected" else None
            )
            for name in by
        },
    }
    if not accuracy_only:
        report["beyond_accuracy"], report["sampled"] = judge_lists(model, ds, split, ks, **options)
    if "oracle" in ds.metadata and data.split == "leave_one_out" and not exclude_seen:
        report["oracle"] = ds.metadata["oracle"][split]
    console = Console(highlight=False)
    print_report(report, console)
    # The file that says that all is done comes last.
    if ranks:
        _write_ranks(ranks, ds, found, equal)
    if predictions:
        write_predictions(predictions, model, ds, split, top_k, **options)
    if csv:
        write_csv(report, csv)
    write_json(report_file, report)
    console.out("wrote", *outputs)
    return report


def _write_ranks(
    path: Path,
    ds: Dataset,
    ranks: Int32[np.ndarray, " n_users"],
    ties: Int32[np.ndarray, " n_users"],
) -> None:
    users = np.flatnonzero(ranks)
    columns = [ds.user_ids.take(users), ranks[users], ties[users]]
    with atomic_write(path) as file:
        pq.write_table(pa.table(columns, schema=RANKS), file)


def _check_outputs(outputs: Sequence[Path], workdir: Path) -> None:
    """Makes sure, before the long computation, that its results will have a place of their own.

    Raises:
        UserError: two results would have the same name, or one the name of something in the run or
            in a dataset.
    """
    places = [path.resolve() for path in outputs]
    for number, (path, place) in enumerate(zip(outputs, places, strict=True)):
        if place in places[:number]:
            raise UserError(f"two results cannot both be written to {path}; name another file")
        beside_dataset = (place.parent / DATASET_FILE).exists()
        of_dataset = place.suffix in (".arrow", ".parquet") or place.name == DATASET_FILE
        in_run = place.is_relative_to(workdir.resolve()) and not place.name.startswith("eval_")
        if place.exists() and (in_run or (beside_dataset and of_dataset)):
            raise UserError(
                f"{path} belongs to a run or a dataset and is not replaced; name another file"
            )
