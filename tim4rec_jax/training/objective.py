"""Training objectives by name: which positions of a batch predict which targets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from tim4rec_jax.layers.attention import segment_positions
from tim4rec_jax.models import SequenceModel, encode_batch, last_touch
from tim4rec_jax.training.cloze import cloze_loss
from tim4rec_jax.training.cross_entropy import Seen, full_cross_entropy
from tim4rec_jax.training.losses import SummedLoss


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
    whole = jnp.zeros_like(targets), jnp.full_like(targets, jnp.iinfo(targets.dtype).max)
    seen = _seen(model, batch["items"], *whole)
    total = loss(hidden, model.item_table(), targets, weights, **seen)
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
    hidden = last_touch(model, hidden, batch)
    return loss(
        hidden.reshape(-1, hidden.shape[-1]),
        model.item_table(),
        batch["targets"].reshape(-1),
        batch["weights"].reshape(-1),
        **_seen(model, items, *_up_to_here(batch["segment_ids"])),
    )


def _seen(model: SequenceModel, items, first, last) -> dict:
    """What the loss has to know of the items before each target, if the model offsets them."""
    if (offset := model.seen_offset()) is None:
        return {}
    return {"seen": Seen(items, first.reshape(-1), last.reshape(-1), offset)}


def _up_to_here(segment_ids):
    """For every position of rows: the first one of its segment, and itself."""
    here = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    return here - segment_positions(segment_ids), here


OBJECTIVES = {
    "prefix": prefix_loss,
    "every_position": every_position_loss,
    "cloze": cloze_loss,  # of batches that `tim4rec_jax.training.cloze.mask_batch` has masked
}
