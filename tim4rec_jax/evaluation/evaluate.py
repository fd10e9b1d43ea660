"""Evaluates models over the users of a split, and what `eval.py` does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Int32
from rich.console import Console
from rich.progress import track

from tim4rec_jax.config import Config
from tim4rec_jax.data import Batch, Convention, Dataset, EvalBatches, open_dataset
from tim4rec_jax.data.splits import Split
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.metrics import SLICES, metrics, sliced_metrics, standard_errors
from tim4rec_jax.evaluation.ranking import ranks, top_k
from tim4rec_jax.evaluation.report import print_report, write_csv
from tim4rec_jax.files import atomic_write, write_json
from tim4rec_jax.models import SequenceModel, encode_batch, inputs
from tim4rec_jax.run import check_model, load_model
from tim4rec_jax.runtime import data_sharding, enable_compilation_cache
from tim4rec_jax.scoring import HistoryItems

# ---- evaluation.loop
# Runs a model over the users of a split: ranks of their targets, or hidden states to rank with.

# Batches the host may be ahead of the device: it never waits, and inputs do not pile up there.
_IN_FLIGHT = 8


def batch_settings(config: Config) -> dict[str, Any]:
    """What a run's settings say about `EvalBatches`: keyword arguments of `evaluate` and `run`."""
    return dict(
        max_length=config.data.max_length,
        batch_size=config.eval.batch_size,
        convention=config.data.convention,
        buckets=config.data.buckets,
    )


def evaluate(
    model: SequenceModel,
    ds: Dataset,
    split: Split,
    *,
    max_length: int,
    batch_size: int,
    convention: Convention,
    buckets: Sequence[int] | None = None,
    exclude_seen: bool = False,
    progress: bool = False,
) -> tuple[dict[str, float], Int32[np.ndarray, " n_users"]]:
    """Ranks every user's target among all items (full ranking).

    Batches are spread over the local devices. Compiled code is kept between calls.

    Args:
        model: see `tim4rec_jax.models`; its scores are `encode(...) @ item_table().T`, and
            `repeat_bias()` more for the items of the history.
        ds: a prepared dataset.
        split: whose targets, see `tim4rec_jax.data.splits`.
        max_length: histories are cut to their last events.
        batch_size: users at once.
        convention: of the time gaps; see `tim4rec_jax.data.time_gaps`.
        buckets: widths of batches; `None` chooses.
        exclude_seen: items of the user's whole history do not compete with the target.
        progress: show a progress bar on stderr.

    Returns:
        The metrics of `tim4rec_jax.evaluation.metrics`, and the rank of each user's target
        by row of the dataset, 0 for users without a target in this split.

    Raises:
        UserError: no user has a target in this split.
    """
    found = np.zeros(ds.n_users, np.int32)
    settings = dict(
        max_length=max_length, batch_size=batch_size, convention=convention, buckets=buckets
    )
    for users, result in run(
        model, ds, split, ranks, exclude_seen=exclude_seen, progress=progress, **settings
    ):
        found[users] = result
    return metrics(found[found > 0]), found


def run(
    model: SequenceModel,
    ds: Dataset,
    split: Split,
    score: Callable[..., Any],
    *,
    exclude_seen: bool = False,
    progress: bool = False,
    **settings: Any,
) -> Iterator[tuple[Int32[np.ndarray, " B"], Any]]:
    """Yields rows of users and, as numpy arrays, what `score` says of them.

    `score(hidden, table, targets, exclude=..., history=...)` is traced once per shape and gets the
    rows of one device: hidden states [B,D], the item table [V+1,D], targets [B], items to leave
    out, [B,S] or None, and items whose scores the model offsets, or None. `settings` are those of
    `tim4rec_jax.data.EvalBatches`, the other arguments those of `evaluate`.
    """
    batches = EvalBatches(ds, split, **settings)
    placement = data_sharding(batches.batch_size)
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, placement.replicated)
    replicated: Any = nnx.merge(graphdef, state)
    table, offset = replicated.item_table(), replicated.repeat_bias()
    needed = inputs(model)

    def dispatch(batch):
        had = None
        if exclude_seen or offset is not None:
            had = history_items(ds, split, batch["users"])
        histories = {name: batch[name] for name in needed if name in batch}
        histories, targets, had = jax.device_put(
            (histories, batch["targets"], had), placement.by_row
        )
        hidden = _encode(graphdef, state, histories)
        rows = hidden, targets, had if exclude_seen else None, None if offset is None else had
        return _score(score, placement.by_row.mesh, rows, (table, offset))

    def fetch(batch, result):
        real = batch["weights"] > 0
        return batch["users"][real], jax.tree.map(lambda array: np.asarray(array)[real], result)

    pending = deque()
    for batch in _tracked(batches, progress):
        pending.append((batch, dispatch(batch)))
        if len(pending) > _IN_FLIGHT:
            yield fetch(*pending.popleft())
    for entry in pending:
        yield fetch(*entry)


@partial(jax.jit, static_argnums=0)
def _encode(graphdef, state, histories):
    model: Any = nnx.merge(graphdef, state)
    return encode_batch(model, histories)


@partial(jax.jit, static_argnums=(0, 1))
def _score(score, mesh, by_row, shared):
    def one_device(by_row, shared):
        (hidden, targets, exclude, items), (table, repeat_bias) = by_row, shared
        history = None if items is None else HistoryItems(items, repeat_bias)
        return score(hidden, table, targets, exclude=exclude, history=history)

    # Left to itself, XLA gathers the scores of all rows on every device for lax.top_k.
    rows, whole = PartitionSpec("batch"), PartitionSpec()
    by_device = jax.shard_map(
        one_device, mesh=mesh, in_specs=(rows, whole), out_specs=rows, check_vma=False
    )
    return by_device(by_row, shared)


def _tracked(batches: EvalBatches, progress: bool) -> Iterable[Batch]:
    if not progress:
        return batches
    return track(batches, "users", console=Console(stderr=True), transient=True)


def history_items(
    ds: Dataset, split: Split, users: Int32[np.ndarray, " B"]
) -> Int32[np.ndarray, "B S"]:
    """All items a user has before the target, however far back, padded with 0.

    S is a power of two, so that batches share few shapes.
    """
    ends = getattr(ds.splits, split)[users]
    width = 1 << int(ends.max() - 1).bit_length()
    return ds.items(ds.offsets[users], ends, width)


# ---- evaluation.command
# What `eval.py` does: opens a run and its dataset, evaluates, prints and writes.


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
        by: slices, see `tim4rec_jax.evaluation.metrics`.
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
    enable_compilation_cache()
    config, model = load_model(workdir)
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
    write_json(json, report)
    written = [json]
    if csv:
        write_csv(report, csv)
        written.append(csv)
    if predictions:
        write_predictions(predictions, model, ds, split, top_k, **settings)
        written.append(predictions)
    console.print("wrote", *written, soft_wrap=True)
    return report


SCHEMA = pa.schema(
    [("user", pa.string()), ("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())]
)


def write_predictions(
    path: Path, model: SequenceModel, ds: Dataset, split: Split, k: int, **settings: Any
) -> int:
    """Writes the `k` best items of every user with a target in the split, best first.

    A row per user and item: `user`, `rank` (1 = best), `item`, `score`; ids are those of the
    source. Users with short histories come first. Written batch by batch, and complete or
    not there at all.

    Args:
        path: the Parquet file.
        model: see `tim4rec_jax.models`.
        ds: a prepared dataset.
        split: the history ends before the target of this split.
        k: items per user; fewer where the catalogue has no more.
        settings: as for `tim4rec_jax.evaluation.evaluate`.

    Returns:
        Number of rows.

    Raises:
        UserError: the file cannot be written.
    """
    rows = 0
    with atomic_write(path) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for users, (scores, items) in run(model, ds, split, _best(k), **settings):
            table = _table(ds, users, scores, items)
            writer.write_table(table)
            rows += len(table)
    return rows


def _best(k: int):
    def best(hidden, table, targets, *, exclude, history):
        del targets
        return top_k(hidden, table, k, exclude=exclude, history=history)

    return best


def _table(ds: Dataset, users, scores, items) -> pa.Table:
    row, rank = np.nonzero(items)  # 0: no item was left
    columns = [
        ds.user_ids.take(users[row]),
        (rank + 1).astype(np.int32),
        ds.item_ids.take(items[row, rank] - 1),
        scores[row, rank].astype(np.float32),
    ]
    return pa.table(columns, schema=SCHEMA)
