"""Runs a model over the users of a split: ranks of their targets, or hidden states to rank with."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Int32
from rich.console import Console
from rich.progress import track

from tim4rec_jax.config import Config
from tim4rec_jax.data import Batch, Convention, Dataset, EvalBatches
from tim4rec_jax.devices import place
from tim4rec_jax.evaluation.metrics import metrics
from tim4rec_jax.evaluation.ranking import Seen, ranks
from tim4rec_jax.models import SequenceModel, encode_batch, inputs

Split = Literal["valid", "test"]
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
            `seen_offset()` more for the items of the history.
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

    `score(hidden, table, targets, exclude=..., seen=...)` is traced once per shape and gets the
    rows of one device: hidden states [B,D], the item table [V+1,D], targets [B], items to leave
    out, [B,S] or None, and items whose scores the model offsets, or None. `settings` are those of
    `tim4rec_jax.data.EvalBatches`, the other arguments those of `evaluate`.
    """
    batches = EvalBatches(ds, split, **settings)
    placement = place(batches.batch_size)
    graphdef, state = nnx.split(model)
    state = jax.device_put(state, placement.replicated)
    replicated: Any = nnx.merge(graphdef, state)
    table, offset = replicated.item_table(), replicated.seen_offset()
    needed = inputs(model)

    def dispatch(batch):
        had = None
        if exclude_seen or offset is not None:
            had = seen_items(ds, split, batch["users"])
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
        (hidden, targets, exclude, items), (table, offset) = by_row, shared
        seen = None if items is None else Seen(items, offset)
        return score(hidden, table, targets, exclude=exclude, seen=seen)

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


def seen_items(
    ds: Dataset, split: Split, users: Int32[np.ndarray, " B"]
) -> Int32[np.ndarray, "B S"]:
    """All items a user has before the target, however far back, padded with 0.

    S is a power of two, so that batches share few shapes.
    """
    ends = getattr(ds.splits, split)[users]
    width = 1 << int(ends.max() - 1).bit_length()
    return ds.items(ds.offsets[users], ends, width)
