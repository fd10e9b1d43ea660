"""Full-ranking evaluation: every user's target is ranked among all items of the catalogue.

`evaluate` is the library call, and `rank_targets` gives the ranks behind its figures. `judge_lists`
says what the lists of best items are like besides accurate, and `write_predictions` writes them.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Int32
from rich.console import Console
from rich.progress import track

from tim4rec_jax import item_rows
from tim4rec_jax.config import Config
from tim4rec_jax.data import Convention, Dataset, EvalBatches
from tim4rec_jax.data.splits import Split
from tim4rec_jax.evaluation import ranking
from tim4rec_jax.evaluation.beyond_accuracy import BeyondAccuracy
from tim4rec_jax.evaluation.metrics import KS, Ties, metrics, tested
from tim4rec_jax.files import table_writer
from tim4rec_jax.models import SequenceModel, encode_batch, inputs
from tim4rec_jax.runtime import AXES, Placement, check_memory, data_sharding, put
from tim4rec_jax.scoring import history_bias

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
    ks: Sequence[int] = KS,
    ties: Ties = "optimistic",
    placement: Placement | None = None,
    sample: tuple[int, int] | None = None,
) -> tuple[dict[str, float], Int32[np.ndarray, " n_users"]]:
    """Ranks every user's target among all items (full ranking).

    The local devices share each batch. Compiled programs are kept between calls, and both splits
    use the same ones.

    Args:
        model: the model. An item's score is the dot product of its row in `item_table()` with the
            hidden state; `scoring.history_bias` is what the items of the history add.
        ds: a prepared dataset.
        split: the split whose targets are ranked; see `tim4rec_jax.data.splits`.
        max_length: the number of events at the end of a history that the model is given.
        batch_size: the number of users in a batch.
        convention: the convention of the time gaps; see `tim4rec_jax.data.time_gaps`.
        buckets: the lengths that batches are padded to; `None` lets `EvalBatches` choose.
        exclude_seen: whether the items of the user's whole history, other than the target, are
            left out of the ranking.
        progress: whether to show a progress bar on standard error.
        ks: the cut-offs k.
        ties: "optimistic" or "expected"; see `tim4rec_jax.evaluation.metrics.per_user`.
        placement: see `rank_targets`.
        sample: a number of users and a seed that draws them. None: all users with a target.

    Returns:
        The metrics of `tim4rec_jax.evaluation.metrics`, and the rank of each user's target by the
        user's row in the dataset. The rank is 0 for a user without a target in this split. It does
        not depend on `ties`.

    Raises:
        UserError: no user has a target in this split, or the buckets do not fit `max_length`.
    """
    ranks, tied = rank_targets(
        model,
        ds,
        split,
        max_length=max_length,
        batch_size=batch_size,
        convention=convention,
        buckets=buckets,
        exclude_seen=exclude_seen,
        progress=progress,
        placement=placement,
        sample=sample,
    )
    best, equals = tested(ranks, tied, ties)
    return metrics(best, ks, equals), ranks


def rank_targets(
    model: SequenceModel,
    ds: Dataset,
    split: Split,
    *,
    exclude_seen: bool = False,
    progress: bool = False,
    placement: Placement | None = None,
    **batching: Any,
) -> tuple[Int32[np.ndarray, " n_users"], Int32[np.ndarray, " n_users"]]:
    """The rank of each user's target, and how many other items have its score.

    Args:
        model: as for `evaluate`, and so are the others.
        ds: a prepared dataset.
        split: the split whose targets are ranked.
        exclude_seen: whether items of the history do not compete.
        progress: whether to show a progress bar on standard error.
        placement: of the model's tables, where they are spread over devices; then every device
            scores its own items. None: the local devices share the users.
        batching: the arguments of `EvalBatches`.

    Returns:
        Two arrays by the user's row in the dataset; see `tim4rec_jax.evaluation.ranking`. The rank
        is 0 for a user without a target in this split.

    Raises:
        UserError: as for `evaluate`.
    """
    batches = EvalBatches(ds, split, **batching)
    ranks, ties = np.zeros(ds.n_users, np.int32), np.zeros(ds.n_users, np.int32)
    score = ranking.ranks_and_ties
    options: Any = dict(exclude_seen=exclude_seen, progress=progress, placement=placement)
    for batch, found in _score_batches(model, batches, split, score, **options):
        ranks[batch["users"]], ties[batch["users"]] = found
    return ranks, ties


def judge_lists(
    model: SequenceModel,
    ds: Dataset,
    split: Split,
    ks: Sequence[int] = KS,
    *,
    exclude_seen: bool = False,
    progress: bool = False,
    **batching: Any,
) -> tuple[dict[str, float], str]:
    """What the lists of the k best items are like; see `tim4rec_jax.evaluation.beyond_accuracy`.

    Args:
        model: as for `evaluate`.
        ds: a prepared dataset, split as for the training.
        split: the split before whose targets the histories end.
        ks: the lengths of the lists.
        exclude_seen: whether items of the history are left out.
        progress: whether to show a progress bar on standard error.
        batching: the arguments of `EvalBatches`.

    Returns:
        The figures, and which of them are those of a part of the lists or users; "" if none.

    Raises:
        UserError: as for `write_predictions`.
    """
    batches = EvalBatches(ds, split, **batching)
    k = min(max(ks), ds.n_items)
    _check_lists_fit(k, batches.batch_size, "ask for shorter lists (--ks)")
    judge = BeyondAccuracy(ds, ks, batches.n_targets)
    for batch, (_, items) in _score_batches(
        model, batches, split, _best(k), exclude_seen=exclude_seen, progress=progress
    ):
        judge.add(items, batch["targets"])
    return judge.figures(), judge.sampled


def compile_evaluation(
    model: SequenceModel,
    ds: Dataset,
    split: Split,
    placement: Placement | None = None,
    **batching: Any,
) -> None:
    """Compiles the programs of `evaluate` by ranking one batch of each width.

    Args:
        model: a model of the right structure. Its weights do not matter.
        ds: a prepared dataset.
        split: a split of it. The other split uses the same programs.
        placement: see `rank_targets`.
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
        ranking.ranks_and_ties,
        exclude_seen=False,
        progress=False,
        placement=placement,
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

    The file is CSV if its name ends in `.csv`, else Parquet. It has a row for each user and item:
    `user`, `rank` (1 is best), `item` and `score`, with the ids of the source. Users with short
    histories come first. Batches are written as they are computed; the file appears under its name
    only when it is complete. The schema of a Parquet file names the dataset and its content.

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
    _check_lists_fit(k, batches.batch_size, "ask for fewer (--top-k)")
    schema = PREDICTIONS.with_metadata(
        {
            "tim4rec.dataset": ds.name,
            "tim4rec.split": split,
            "tim4rec.content": json.dumps(ds.metadata.get("content", {})),
        }
    )
    with table_writer(path, schema) as writer:
        for batch, (scores, items) in _score_batches(
            model, batches, split, _best(k), exclude_seen=exclude_seen, progress=progress
        ):
            row, place = np.nonzero(items)  # item 0 fills up where no item was left
            columns = [
                ds.user_ids.take(batch["users"][row]),
                (place + 1).astype(np.int32),
                ds.item_ids.take(items[row, place] - 1),
                scores[row, place].astype(np.float32),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            rows += len(row)
    return rows


def _check_lists_fit(k: int, batch_size: int, remedy: str) -> None:
    check_memory(
        f"{k:,} predictions for each of {batch_size:,} users at once",
        # Scores and indices of the batches in flight, and of the one that is merged with a block.
        8 * batch_size * k * (_IN_FLIGHT + 3),
        remedy,
    )


@functools.cache  # compiled programs are found by the identity of the function
def _best(k: int) -> Callable[..., Any]:
    def best(hidden, table, targets, **options):
        del targets
        return ranking.top_k(hidden, table, k, **options)

    return best


def _score_batches(
    model: SequenceModel,
    batches: EvalBatches,
    split: Split,
    score: Callable[..., Any],
    *,
    exclude_seen: bool,
    progress: bool,
    placement: Placement | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], Any]]:
    """Yields, batch by batch, the users' rows in the dataset, their targets, and their scores.

    What comes last is that which `score(hidden, table, targets, exclude=..., history=...)` returns.
    It has the arguments of `ranking.ranks`, sees the rows of one device, and is traced once per
    shape. `numbers` chooses batches.
    """
    graphdef, state = nnx.split(model)
    if placement is None or placement.by_item is None:
        placement = data_sharding(batches.batch_size)
        state = jax.device_put(state, placement.replicated)
        weights = _scoring_weights(graphdef, state)
        adds_to_history = weights[1] is not None
        score_batch = functools.partial(_score, score, exclude_seen, placement.mesh)
    else:
        names = model.item_rows
        weights = item_rows.split(state, names)
        bias = jax.eval_shape(lambda state: history_bias(nnx.merge(graphdef, state)), state)
        adds_to_history = bias is not None
        score_batch = functools.partial(
            _score_on_shards,
            score,
            exclude_seen,
            graphdef,
            placement.mesh,
            model.n_items + 1,
            names,
        )
    even = batches.batch_size % placement.devices == 0
    by_row = placement.by_row if even else placement.replicated

    def dispatch(batch):
        histories = {name: batch[name] for name in inputs(model) if name in batch}
        items = None
        if exclude_seen or adds_to_history:
            items = _history_items(batches.dataset, split, batch["users"])
        users = histories, batch["targets"], items
        histories, targets, items = put(users, by_row)
        return score_batch(_encode(graphdef, state, histories), targets, items, *weights)

    def fetch(batch, result):
        real = batch["weights"] > 0
        known = {name: batch[name][real] for name in ("users", "targets")}
        return known, jax.tree.map(lambda array: np.asarray(array)[real], result)

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
    return model.item_table(), history_bias(model)


@functools.partial(jax.jit, static_argnames=("score", "exclude_seen", "mesh"))
def _score(score, exclude_seen, mesh, hidden, targets, items, table, bias):
    def one_device(hidden, targets, items, table, bias):
        return score(hidden, table, targets, **_marks(items, exclude_seen, bias))

    # Left to itself, XLA gathers the scores of all rows on every device for lax.top_k.
    rows, whole = PartitionSpec("data"), PartitionSpec()
    by_device = jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(rows, rows, rows, whole, whole),
        out_specs=rows,
        check_vma=False,
    )
    return by_device(hidden, targets, items, table, bias)


def _marks(items, exclude_seen, bias):
    """What the items of the history are marked for."""
    return dict(
        exclude=items if exclude_seen else None,
        history=None if bias is None else bias.of(items),
    )


@functools.partial(
    jax.jit, static_argnames=("score", "exclude_seen", "graphdef", "mesh", "rows", "names")
)
def _score_on_shards(
    score, exclude_seen, graphdef, mesh: Mesh, rows, names, hidden, targets, items, dense, tables
):
    """`_score`, where every device has other items and all users of the batch.

    The vectors of items are computed in it, since they may be the parameters themselves: a program
    that gave them back would hold another copy of the table.
    """

    def one_device(hidden, targets, items, dense, tables):
        model: Any = nnx.merge(graphdef, item_rows.join(dense, tables))
        table = model.item_table()
        first = jax.lax.axis_index(AXES) * len(table)
        place = targets - first
        here = ((place >= 0) & (place < len(table)))[:, None]
        of_targets = jnp.where(here, jnp.take(table, place, axis=0, mode="clip"), 0)
        shard = ranking.Shard(first, rows, jax.lax.psum(of_targets, AXES))
        marks = _marks(items, exclude_seen, history_bias(model))
        return score(hidden, table, targets, **marks, shard=shard)

    whole = PartitionSpec()
    by_item = PartitionSpec(AXES)
    return jax.shard_map(
        one_device,
        mesh=mesh,
        in_specs=(whole, whole, whole, whole, by_item),
        out_specs=whole,
        check_vma=False,
    )(hidden, targets, items, dense, tables)


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
