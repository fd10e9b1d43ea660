"""Objectives: which positions of a batch predict which targets.

An objective takes a model and a batch and returns a sum over its targets, each target's loss times
its weight. `loss` is one of `tim4rec_jax.training.losses`; it compares hidden states with targets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from tim4rec_jax.data import Batch
from tim4rec_jax.layers.attention import segment_positions
from tim4rec_jax.models import SequenceModel, condition_on_time, encode_batch
from tim4rec_jax.models.bert4rec import BERT4Rec
from tim4rec_jax.scoring import HistoryBias, HistoryItems, last_item
from tim4rec_jax.training.losses import SummedLoss, full_cross_entropy, summed_cross_entropy


def prefix_loss(
    model: SequenceModel,
    batch: Batch,
    seeds: UInt32[Array, " B"] | None,
    loss: SummedLoss = full_cross_entropy,
) -> Float[Array, ""]:
    """The end of each window predicts the event that follows it (paper, section 3.5).

    Args:
      model: any model.
      batch: of `tim4rec_jax.data.TrainBatches`.
      seeds: dropout seeds per row. None switches dropout off.
      loss: of `tim4rec_jax.training.losses`.
    """
    hidden, weights = encode_batch(model, batch, seeds), batch["weights"]
    history = {}
    if (repeat_bias := model.repeat_bias()) is not None:
        bias = HistoryBias(repeat_bias, last_bias=model.last_bias())
        history["history"] = bias.of(batch["items"])
    total = loss(*_scored(model, hidden), batch["targets"], weights, **history)
    return total + weights.sum() * model.penalty()


def every_position_loss(
    model: SequenceModel,
    batch: Batch,
    seeds: UInt32[Array, " B"] | None,
    loss: SummedLoss = full_cross_entropy,
) -> Float[Array, ""]:
    """Every position of packed rows predicts the event after it.

    Args:
      model: a causal model.
      batch: of `tim4rec_jax.data.PackedBatches`.
      seeds: dropout seeds per row. None switches dropout off.
      loss: of `tim4rec_jax.training.losses`.
    """
    items, segment_ids = batch["items"], batch["segment_ids"]
    lengths = jnp.full(items.shape[0], items.shape[1])
    hidden = model(items, lengths, batch["gaps"], segment_ids=segment_ids, dropout_seeds=seeds)
    hidden = condition_on_time(model, hidden, batch)
    history = {}
    if (repeat_bias := model.repeat_bias()) is not None:
        # The history of a position is its segment, up to the position itself.
        last = jnp.broadcast_to(jnp.arange(items.shape[1]), items.shape)
        first = last - segment_positions(segment_ids)
        at_end = None
        if (last_bias := model.last_bias()) is not None:
            before = jnp.where(first < last, jnp.roll(items, 1, axis=1), 0)
            recent = jnp.stack([items.reshape(-1), before.reshape(-1)], axis=1)
            at_end = last_item(last_bias, recent)
        history["history"] = HistoryItems(
            items, repeat_bias, first.reshape(-1), last.reshape(-1), at_end=at_end
        )
    return loss(
        *_scored(model, hidden.reshape(-1, hidden.shape[-1])),
        batch["targets"].reshape(-1),
        batch["weights"].reshape(-1),
        **history,
    )


def cloze_loss(
    model: BERT4Rec,
    batch: Batch,
    seeds: UInt32[Array, " B"] | None,
    loss: SummedLoss = summed_cross_entropy,
) -> Float[Array, ""]:
    """Masked items are filled in from both sides (arXiv 1904.06690).

    Args:
      model: a model that fills masks.
      batch: of `mask_batch`.
      seeds: dropout seeds per row. None switches dropout off.
      loss: of `tim4rec_jax.training.losses`.
    """
    hidden = model.fill(batch["items"], batch["positions"], seeds)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets, weights = batch["targets"].reshape(-1), batch["weights"].reshape(-1)
    # Most places for targets are empty. At the end of the list they cost no scores.
    order = jnp.argsort(weights == 0, stable=True)
    return loss(*_scored(model, hidden[order]), targets[order], weights[order])


def _scored(
    model: SequenceModel, hidden: Float[Array, "N D"]
) -> tuple[Float[Array, "N E"], Float[Array, "V E"]]:
    """Hidden states and item table, whose products are the scores in a loss.

    With item features, items without training events take no part in the loss. One more column
    lowers their scores by so much that they count for nothing.
    """
    table = model.item_table()
    if model.feature_maps is None:
        return hidden, table
    excluded = model.feature_maps.excluded[...].astype(table.dtype)
    one = jnp.ones_like(hidden[:, :1])
    return jnp.concatenate([hidden, one], 1), jnp.concatenate([table, excluded[:, None]], 1)


def mask_batch(model: BERT4Rec, batch: Batch, key: jax.Array) -> Batch:
    """Masks items as TiM4Rec's comparison did.

    One draw decides for the whole batch. With probability `model.ft_ratio` the last item of every
    window is masked. Otherwise each item is masked with probability `model.mask_ratio`. The last
    M = int(mask_ratio * max_length) masked items of a row are targets, and the other masked items
    are not. The first position of a row is never a target.

    Args:
      model: has the two ratios, the mask token and `max_length`.
      batch: of `tim4rec_jax.data.TrainBatches`.
      key: a key of `jax.random`.

    Returns:
      The batch with masked `items`, and with what belongs to the targets, in M columns or as many
      as `items` has: `positions` int32 [B,M], `targets` int32 [B,M], and `weights` float32 [B,M],
      which is 0 where there is no target.
    """
    items, last = batch["items"], batch["lengths"][:, None] - 1
    length = items.shape[1]
    index = jnp.arange(length)
    key_of_batch, key_of_items = jax.random.split(key)
    drawn = jax.random.bernoulli(key_of_items, model.mask_ratio, items.shape) & (index <= last)
    masked = jnp.where(jax.random.bernoulli(key_of_batch, model.ft_ratio), index == last, drawn)
    most = max(1, int(model.mask_ratio * model.max_length))
    positions, _ = jax.lax.top_k(jnp.where(masked, index, 0), min(most, length))
    return batch | {
        "items": jnp.where(masked, jnp.int32(model.mask_token), items),
        "positions": positions,
        "targets": jnp.take_along_axis(items, positions, axis=1),
        "weights": batch["weights"][:, None] * (positions > 0),
    }


class Objective(NamedTuple):
    """An objective.

    Attributes:
      loss: the summed loss `(model, batch, seeds, loss)` of a batch, or of a part of its rows.
      prepare: what happens to the whole batch first, `(model, batch, key)`.
    """

    loss: Callable[..., jax.Array]
    prepare: Callable[[Any, Batch, jax.Array], Batch] = lambda model, batch, key: batch


OBJECTIVES = {
    "prefix": Objective(prefix_loss),
    "every_position": Objective(every_position_loss),
    "cloze": Objective(cloze_loss, prepare=mask_batch),
}
