"""Full-ranking evaluation: every user's target is ranked among all items of the catalogue.

`evaluate` is the library call, `write_predictions` lists each user's best items instead, and
`evaluate_run` is what `eval.py` does: it evaluates a run, prints a report and writes it to files.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from tim4rec_jax.data import Convention, Dataset, EvalBatches, open_dataset
from tim4rec_jax.data.format import DATASET_FILE
from tim4rec_jax.data.splits import Split
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import ranking
from tim4rec_jax.evaluation.metrics import SLICES, metrics, sliced_metrics, standard_errors
from tim4rec_jax.evaluation.report import print_report, write_csv
from tim4rec_jax.files import atomic_write, write_json
from tim4rec_jax.models import SequenceModel, encode_batch, inputs
from tim4rec_jax.run import check_model, check_same_dataset, load_model
from tim4rec_jax.runtime import check_memory, data_sharding, enable_compilation_cache
from tim4rec_jax.scoring import HistoryItems

# How many batches the host may be ahead of the device. The device never waits for the next batch,
# and its memory does not fill with batches that wait.
_IN_FLIGHT = 8

# The table that `write_predictions` writes.
PREDICTIONS = pa.schema(
    [("user", pa.string()), ("rank", pa.int32()), ("item", pa.string()), ("score", pa.float32())]
)


def batch_settings(config: Config) -> dict[str, Any]:
    """The keyword arguments of `evaluate` that a run's settings decide."""
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

    The local devices share each batch. Compiled programs are kept between calls, and both splits
    use the same ones.

    Args:
        model: the model. An item's score is the dot product of its row in `item_table()` with the
            hidden state; the items of the history get `repeat_bias()` in addition.
        ds: a prepared dataset.
        split: the split whose targets are ranked; see `tim4rec_jax.data.splits`.
        max_length: the number of events at the end of a history that the model is given.
        batch_size: the number of users in a batch.
        convention: the convention of the time gaps; see `tim4rec_jax.data.time_gaps`.
        buckets: the lengths that batches are padded to; `None` lets `EvalBatches` choose.
        exclude_seen: whether the items of the user's whole history, other than the target, are
            left out of the ranking.
        progress: whether to show a progress bar on standard error.

    Returns:
        The metrics of `tim4rec_jax.evaluation.metrics`, and the rank of each user's target by the
        user's row in the dataset. The rank is 0 for a user without a target in this split.

    Raises:
        UserError: no user has a target in this split, or the buckets do not fit `max_length`.
    """
    batches = EvalBatches(
        ds,
        split,
        max_length=max_length,
        batch_size=batch_size,
        convention=convention,
        buckets=buckets,
    )
    ranks = np.zeros(ds.n_users, np.int32)
    for users, found in _score_batches(
        model, batches, split, ranking.ranks, exclude_seen=exclude_seen, progress=progress
    ):
        ranks[users] = found
    return metrics(ranks[ranks > 0]), ranks


def compile_evaluation(model: SequenceModel, ds: Dataset, split: Split, **batching: Any) -> None:
    """Compiles the programs of `evaluate` by ranking one batch of each width.

    Args:
        model: a model of the right structure. Its weights do not matter.
        ds: a prepared dataset.
        split: a split of it. The other split uses the same programs.
        batching: the arguments of `EvalBatches`, as for `evaluate`.

    Raises:
        UserError: as for `evaluate`.
    """
    batches = EvalBatches(ds, split, **batching)
    last_of_width = {batches.width(number): number for number in range(len(batches))}
    for _ in _score_batches(
        model,
        batches,
        split,
        ranking.ranks,
        exclude_seen=False,
        progress=False,
        numbers=list(last_of_width.values()),
    ):
        pass


def write_predictions(
    path: Path,
    model: SequenceModel,
    ds: Dataset,
    split: Split,
    k: int,
    *,
    exclude_seen: bool = False,
    progress: bool = False,
    **batching: Any,
) -> int:
    """Writes the `k` best items of every user with a target in the split, best first.

    The Parquet file has one row per user and item: `user`, `rank` (1 is best), `item` and `score`,
    with the ids of the source. Users with short histories come first. Batches are written as they
    are computed; the file appears under its name only when it is complete. The metadata of its
    schema name the dataset and its content.

    Args:
        path: the file to write.
        model: as for `evaluate`.
        ds: a prepared dataset.
        split: the split before whose targets the histories end.
        k: the number of items per user. A user gets fewer where fewer items are left.
        exclude_seen: whether the items of the user's whole history are left out.
        progress: whether to show a progress bar on standard error.
        batching: the arguments of `EvalBatches`, as for `evaluate`.

    Returns:
        The number of rows.

    Raises:
        UserError: the file cannot be written, the memory does not suffice, or as for `evaluate`.
    """
    rows, k = 0, min(k, ds.n_items)
    batches = EvalBatches(ds, split, **batching)
    check_memory(
        f"{k:,} predictions for each of {batches.batch_size:,} users at once",
        # Scores and indices of the batches in flight, and of the one that is merged with a block.
        8 * batches.batch_size * k * (_IN_FLIGHT + 3),
        "ask for fewer (--top-k)",
    )
    schema = PREDICTIONS.with_metadata(
        {
            "tim4rec.dataset": ds.name,
            "tim4rec.split": split,
            "tim4rec.content": json.dumps(ds.metadata.get("content", {})),
        }
    )
    with atomic_write(path) as file, pq.ParquetWriter(file, schema) as writer:
        for users, (scores, items) in _score_batches(
            model, batches, split, _best(k), exclude_seen=exclude_seen, progress=progress
        ):
            row, place = np.nonzero(items)  # item 0 fills up where no item was left
            columns = [
                ds.user_ids.take(users[row]),
                (place + 1).astype(np.int32),
                ds.item_ids.take(items[row, place] - 1),
                scores[row, place].astype(np.float32),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            rows += len(row)
    return rows


@functools.cache  # compiled programs are found by the identity of the function
def _best(k: int) -> Callable[..., Any]:
    def best(hidden, table, targets, *, exclude, history):
        del targets
        return ranking.top_k(hidden, table, k, exclude=exclude, history=history)

    return best


def _score_batches(
    model: SequenceModel,
    batches: EvalBatches,
    split: Split,
    score: Callable[..., Any],
    *,
    exclude_seen: bool,
    progress: bool,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[Int32[np.ndarray, " B"], Any]]:
    """Yields, batch by batch, the users' rows in the dataset and what `score` returns for them.

    `score(hidden, table, targets, exclude=..., history=...)` has the arguments of `ranking.ranks`.
    It sees the rows of one device, and is traced once per shape. `numbers` chooses batches.
    """
    placement = data_sharding(batches.batch_size)
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, placement.replicated)
    table, repeat_bias = _scoring_weights(graphdef, state)

    def dispatch(batch):
        histories = {name: batch[name] for name in inputs(model) if name in batch}
        items = None
        if exclude_seen or repeat_bias is not None:
            items = _history_items(batches.dataset, split, batch["users"])
        histories, targets, items = jax.device_put(
            (histories, batch["targets"], items), placement.by_row
        )
        hidden = _encode(graphdef, state, histories)
        mesh = placement.by_row.mesh
        return _score(score, exclude_seen, mesh, hidden, targets, items, table, repeat_bias)

    def fetch(batch, result):
        real = batch["weights"] > 0
        return batch["users"][real], jax.tree.map(lambda array: np.asarray(array)[real], result)

    pending = deque()
    console = Console(stderr=True)
    hidden = not (progress and console.is_terminal)
    chosen = range(len(batches)) if numbers is None else numbers
    for number in track(chosen, "users", console=console, transient=True, disable=hidden):
        batch = batches[number]
        pending.append((batch, dispatch(batch)))
        if len(pending) > _IN_FLIGHT:
            yield fetch(*pending.popleft())
    for entry in pending:
        yield fetch(*entry)


@functools.partial(jax.jit, static_argnames="graphdef")
def _encode(graphdef, state, histories):
    return encode_batch(nnx.merge(graphdef, state), histories)


@functools.partial(jax.jit, static_argnames="graphdef")
def _scoring_weights(graphdef, state):
    model: Any = nnx.merge(graphdef, state)
    return model.item_table(), model.repeat_bias()


@functools.partial(jax.jit, static_argnames=("score", "exclude_seen", "mesh"))
def _score(score, exclude_seen, mesh, hidden, targets, items, table, repeat_bias):
    def one_device(hidden, targets, items, table, repeat_bias):
        return score(
            hidden,
            table,
            targets,
            exclude=items if exclude_seen else None,
            history=None if repeat_bias is None else HistoryItems(items, repeat_bias),
        )

    # Left to itself, XLA gathers the scores of all rows on every device for lax.top_k.
    rows, whole = PartitionSpec("batch"), PartitionSpec()
    by_device = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(rows, rows, rows, whole, whole),
        out_specs=rows,
        check_vma=False,
    )
    return by_device(hidden, targets, items, table, repeat_bias)


def _history_items(
    ds: Dataset, split: Split, users: Int32[np.ndarray, " B"]
) -> Int32[np.ndarray, "B S"]:
    """All items that each user has before the target, however far back, padded with 0.

    S is 16, 64, 256 and so on: few widths, because each is one more program to compile.
    """
    ends = getattr(ds.splits, split)[users]
    width = 16
    while width < ends.max():
        width *= 4
    return ds.items(ds.offsets[users], ends, width)


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
    """Evaluates the best checkpoint of a run, prints a report and writes the files asked for.

    Args:
        workdir: the run directory.
        dataset: a prepared dataset; `None` takes the dataset of the training.
        split: `"valid"` or `"test"`.
        exclude_seen: whether the items of a user's history are left out, of the ranking and of the
            predictions.
        by: the slices to report, of `tim4rec_jax.evaluation.metrics.SLICES`.
        json: the file for the report; `None` takes `eval_<split>.json` in `workdir`, or
            `eval_<split>_exclude_seen.json`.
        csv: the file for the figures as a table, one figure per line; `None` writes none.
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
    outputs = [path for path in (predictions, csv, report_file) if path]
    _check_outputs(outputs, workdir)
    enable_compilation_cache()
    config: Any
    config, model = load_model(workdir)
    data = config.data
    ds = open_dataset(dataset or config.dataset).split(data.split, data.valid_from, data.test_from)
    check_model(model, ds.n_items, ds.directory, workdir)
    if (workdir / DATASET_FILE).exists():
        check_same_dataset(ds.directory, ds.metadata, workdir / DATASET_FILE)
    options: dict[str, Any] = dict(exclude_seen=exclude_seen, progress=True)
    options |= batch_settings(config)
    size, length = config.eval.batch_size, data.max_length
    check_memory(
        f"batches of {size:,} users with {length:,} events",
        4 * size * (2 * ranking.BLOCK_SIZE + 4 * length),
        f"set a smaller eval.batch_size in {workdir / 'config.json'}",
    )
    figures, ranks = evaluate(model, ds, split, **options)
    report = {
        "workdir": str(workdir),
        "dataset": ds.name,
        "content": ds.metadata["content"],
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
    # The file that says that all is done comes last.
    if predictions:
        write_predictions(predictions, model, ds, split, top_k, **options)
    if csv:
        write_csv(report, csv)
    write_json(report_file, report)
    console.print("wrote", *outputs, soft_wrap=True, markup=False, highlight=False)
    return report


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
