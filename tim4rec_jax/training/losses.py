"""Losses by name: how the hidden states of a batch are held against their targets.

All come as sums `loss(hidden, table, targets, weights)` over rows, and none ever holds the scores
of all rows and items at once. The sampled ones score a few hundred items drawn for the batch,
which all rows share: one matrix product, as cheap as it gets.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int64, UInt32

from tim4rec_jax.training.cross_entropy import (
    cross_entropy,
    full_cross_entropy,
    summed_cross_entropy,
)

__all__ = [
    "Loss",
    "SummedLoss",
    "bpr",
    "cross_entropy",
    "cumulative_counts",
    "full_cross_entropy",
    "gbce",
    "sampled_softmax",
    "summed_cross_entropy",
]

# Of hidden, table, targets and weights; the full cross-entropy of `seen`, too.
SummedLoss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss by name.

    Attributes:
      name: `cross_entropy`, over all items; or over items drawn for the batch:
        `sampled_softmax` (drawn by their frequency in training, which the scores are corrected
        for: Bengio & Senecal 2008), `gbce` (drawn uniformly; arXiv 2308.07192) or `bpr` (drawn
        uniformly; arXiv 1205.2618).
      negatives: how many are drawn.
      calibration: t of gBCE, from 0 (plain binary cross-entropy) to 1 (scores are
        probabilities although most items are never seen as negatives).
    """

    name: Literal["cross_entropy", "sampled_softmax", "gbce", "bpr"] = "cross_entropy"
    negatives: int = 512
    calibration: float = 0.75

    def prepare(self, key: jax.Array, items: int, up_to: UInt32[Array, " V"] | None) -> SummedLoss:
        """The loss of one batch, with the items drawn for it.

        Args:
          key: of `jax.random`.
          items: number of items, without padding.
          up_to: for `sampled_softmax` the training events (at least one each) of the items up to
            each row of the table, rising: `cumulative_counts`.
        """
        if self.name == "cross_entropy":
            return full_cross_entropy
        if self.name == "sampled_softmax":
            assert up_to is not None
            event = jax.random.bits(key, (self.negatives,)) % up_to[-1]
            drawn = jnp.searchsorted(up_to, event, side="right").astype(jnp.int32)
            # What a row of the table is drawn with: log of its share of the events.
            count = jnp.diff(up_to, prepend=jnp.zeros(1, up_to.dtype)).astype(jnp.float32)
            log_share = jnp.log(count) - jnp.log(up_to[-1].astype(jnp.float32))
            return functools.partial(sampled_softmax, drawn=drawn, log_share=log_share)
        drawn = jax.random.randint(key, (self.negatives,), 1, items + 1)
        if self.name == "bpr":
            return functools.partial(bpr, drawn=drawn)
        share = min(1.0, self.negatives / max(items - 1, 1))
        power = share * (self.calibration * (1 - 1 / share) + 1 / share)
        return functools.partial(gbce, drawn=drawn, power=power)


def cumulative_counts(counts: Int64[np.ndarray, " V"]) -> UInt32[Array, " V_and_1"]:
    """`up_to` of `Loss.prepare` from the training events [n_items] of the items, one added each."""
    return jnp.asarray(np.concatenate([[0], np.cumsum(counts + 1)]), jnp.uint32)


def _scores(hidden, table, targets, drawn):
    """Scores of the target [N] and of what was drawn [N,S], and whether that is another item."""
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    table = table.astype(hidden.dtype)
    right = jnp.einsum("nd,nd->n", hidden, table[targets], preferred_element_type=accumulate)
    others = jnp.matmul(hidden, table[drawn].T, preferred_element_type=accumulate)
    return right, others, drawn != targets[:, None]


def sampled_softmax(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    drawn: Int[Array, " S"],
    log_share: Float[Array, " V"],
) -> Float[Array, ""]:
    """Cross-entropy over the target and the items drawn with shares `exp(log_share)`.

    Scores are lowered by the log of how often an item is expected among those drawn, so that
    the sums over what was drawn estimate those over all items.
    """
    right, others, different = _scores(hidden, table, targets, drawn)
    others = others - (log_share[drawn] + jnp.log(len(drawn)))
    others = jnp.where(different, others, -jnp.inf)
    total = jax.nn.logsumexp(jnp.concatenate([right[:, None], others], axis=1), axis=1)
    return jnp.sum(weights * (total - right))


def gbce(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    drawn: Int[Array, " S"],
    power: float,
) -> Float[Array, ""]:
    """Generalised binary cross-entropy (arXiv 2308.07192, section 5): sigmoid(target)^power."""
    right, others, different = _scores(hidden, table, targets, drawn)
    wrong = jnp.sum(jnp.where(different, jax.nn.softplus(others), 0), axis=1)
    return jnp.sum(weights * (power * jax.nn.softplus(-right) + wrong))


def bpr(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    *,
    drawn: Int[Array, " S"],
) -> Float[Array, ""]:
    """Bayesian personalised ranking (arXiv 1205.2618): mean of -log sigmoid(target - other)."""
    right, others, different = _scores(hidden, table, targets, drawn)
    losses = jnp.where(different, jax.nn.softplus(others - right[:, None]), 0)
    return jnp.sum(weights * losses.sum(1) / jnp.maximum(different.sum(1), 1))
