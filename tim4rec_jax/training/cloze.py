"""The objective `cloze`: items are masked and filled in again from both sides (BERT4Rec)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from tim4rec_jax.models.bert4rec import BERT4Rec
from tim4rec_jax.training.cross_entropy import summed_cross_entropy
from tim4rec_jax.training.losses import SummedLoss


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
