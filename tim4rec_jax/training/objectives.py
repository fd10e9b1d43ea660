"""Training objectives by name: which positions of a batch predict which targets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from tim4rec_jax.layers.attention import segment_positions
from tim4rec_jax.models import SequenceModel, condition_on_time, encode_batch
from tim4rec_jax.models.bert4rec import BERT4Rec
from tim4rec_jax.scoring import HistoryItems
from tim4rec_jax.training.losses import SummedLoss, full_cross_entropy, summed_cross_entropy

# ---- training.cloze
# The objective `cloze`: items are masked and filled in again from both sides (BERT4Rec).


def mask_batch(model: BERT4Rec, batch: dict, key: jax.Array) -> dict:
    """Masks a batch as TiM4Rec's comparison did.

    With probability `ft_ratio`, one draw for the whole batch, the last item of every history is
    masked; otherwise every item is with probability `mask_ratio`. At most the last
    M = int(mask_ratio * max_length) masked items of a row are targets, the others stay masked
    all the same. Position 0 is never a target.

    Args:
      model: says ratios, mask token and longest history.
      batch: of `tim4rec_jax.data.TrainBatches`.
      key: of `jax.random`.

    Returns:
      The batch with masked `items`, and for the targets, M a row or fewer in shorter batches:
      `positions` int32 [B,M], `targets` int32 [B,M] and `weights` float32 [B,M], 0 where there
      is no target.
    """
    items, end = batch["items"], batch["lengths"][:, None] - 1
    length = items.shape[1]
    index = jnp.arange(length)
    branch, each = jax.random.split(key)
    drawn = jax.random.bernoulli(each, model.mask_ratio, items.shape) & (index <= end)
    masked = jnp.where(jax.random.bernoulli(branch, model.ft_ratio), index == end, drawn)
    most = max(1, int(model.mask_ratio * model.max_length))
    positions, _ = jax.lax.top_k(jnp.where(masked, index, 0), min(most, length))
    return batch | {
        "items": jnp.where(masked, jnp.int32(model.mask_token), items),
        "positions": positions,
        "targets": jnp.take_along_axis(items, positions, axis=1),
        "weights": batch["weights"][:, None] * (positions > 0),
    }


def cloze_loss(
    model: BERT4Rec,
    batch: dict,
    seeds: UInt32[Array, " B"] | None,
    loss: SummedLoss = summed_cross_entropy,
) -> jax.Array:
    """Sum over the targets of a masked batch of weight times loss.

    Args:
      model: fills masks.
      batch: of `mask_batch`.
      seeds: dropout seeds per row; None switches dropout off.
      loss: of `tim4rec_jax.training.losses`.
    """
    hidden = model.fill(batch["items"], batch["positions"], seeds)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    targets, weights = batch["targets"].reshape(-1), batch["weights"].reshape(-1)
    # Most places for targets are empty: behind the others they cost no scores.
    order = jnp.argsort(weights == 0, stable=True)
    return loss(hidden[order], model.item_table(), targets[order], weights[order])


# ---- training.objective
# Training objectives by name: which positions of a batch predict which targets.


def prefix_loss(
    model: SequenceModel,
    batch: dict,
    seeds: UInt32[Array, " B"] | None,
    loss: SummedLoss = full_cross_entropy,
) -> jax.Array:
    """Sum over the batch of weight times the loss at each history's end (paper, section 3.5).

    Args:
      model: see `tim4rec_jax.models`.
      batch: of `tim4rec_jax.data.TrainBatches`.
      seeds: dropout seeds per row; None switches dropout off.
      loss: of `tim4rec_jax.training.losses`.
    """
    hidden, weights = encode_batch(model, batch, seeds), batch["weights"]
    targets = batch["targets"]
    history = _history(model, batch["items"])
    total = loss(hidden, model.item_table(), targets, weights, **history)
    return total + weights.sum() * model.penalty()


def every_position_loss(
    model: SequenceModel,
    batch: dict,
    seeds: UInt32[Array, " R"] | None,
    loss: SummedLoss = full_cross_entropy,
) -> jax.Array:
    """Sum over all positions of packed rows of weight times the loss there.

    Args:
      model: a causal one.
      batch: as `tim4rec_jax.data.PackedBatches` describes.
      seeds: dropout seeds per row; None switches dropout off.
      loss: of `tim4rec_jax.training.losses`.
    """
    items = batch["items"]
    hidden = model(
        items,
        jnp.full(items.shape[0], items.shape[1]),
        batch["gaps"],
        segment_ids=batch["segment_ids"],
        dropout_seeds=seeds,
    )
    hidden = condition_on_time(model, hidden, batch)
    return loss(
        hidden.reshape(-1, hidden.shape[-1]),
        model.item_table(),
        batch["targets"].reshape(-1),
        batch["weights"].reshape(-1),
        **_history(model, items, *_up_to_here(batch["segment_ids"])),
    )


def _history(model: SequenceModel, items, first=None, last=None) -> dict:
    """The argument `history` of the loss, if the model has a repeat bias."""
    if (repeat_bias := model.repeat_bias()) is None:
        return {}
    return {"history": HistoryItems(items, repeat_bias, first, last)}


def _up_to_here(segment_ids):
    """For every position, row after row: the first position of its segment, and its own."""
    here = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    return (here - segment_positions(segment_ids)).reshape(-1), here.reshape(-1)


OBJECTIVES = {
    "prefix": prefix_loss,
    "every_position": every_position_loss,
    "cloze": cloze_loss,  # of batches that `tim4rec_jax.training.objectives.mask_batch` has masked
}
