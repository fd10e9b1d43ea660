"""Losses: how hidden states are compared with their targets.

All losses are sums over rows, `loss(hidden, table, targets, weights)`. None ever holds the scores
of all rows and items at once. The sampled losses score a few hundred items instead of all. These
are drawn once for the batch, and all rows share them: the scores are one matrix product.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tim4rec_jax.layers.lookup import add_at, lookup
from tim4rec_jax.models import imported
from tim4rec_jax.runtime import target
from tim4rec_jax.scoring import HistoryItems, LastItem, add_at_end, add_history, added_to, item_mask
from tim4rec_jax.training.negatives import (
    Drawn,
    ItemFrequencies,
    draw_by_frequency,
    draw_uniformly,
)

# The arguments are hidden states, item table, targets and weights. All but a function of the user's
# take `history`, too.
SummedLoss = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss, by its name and settings.

    Attributes:
      name: `cross_entropy` goes over all items. The others go over items drawn for the batch.
        `sampled_softmax` draws items by their frequency in training and corrects the scores for
        that (Bengio & Senecal 2008). `gbce` (arXiv 2308.07192) and `bpr` (arXiv 1205.2618) draw
        all items equally often. "module:function" is a function of the user's with the arguments
        `hidden`, `table`, `targets` and `weights` of `full_cross_entropy`.
      negatives: number of items to draw.
      calibration: t of gBCE. With 0 it is the plain binary cross-entropy. With 1 the scores are
        probabilities, although most items are never among those drawn.
    """

    name: str = "cross_entropy"
    negatives: int = 512
    calibration: float = 0.75

    @property
    def is_sampled(self) -> bool:
        """Whether items are drawn for each batch."""
        return self.name in ("sampled_softmax", "gbce", "bpr")

    def draw(
        self,
        key: jax.Array,
        n_items: int,
        frequencies: ItemFrequencies | None,
        look_up: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Drawn | None:
        """The items for one batch; None: the loss needs none.

        Args:
          key: a key of `jax.random`.
          n_items: number of items, without padding.
          frequencies: of the items. Only `sampled_softmax` needs them.
          look_up: see `tim4rec_jax.training.negatives.draw_by_frequency`.
        """
        if self.name == "sampled_softmax":
            assert frequencies is not None
            return draw_by_frequency(key, self.negatives, frequencies, look_up)
        return draw_uniformly(key, self.negatives, n_items) if self.is_sampled else None

    def of(self, drawn: Drawn | None, n_items: int) -> SummedLoss:
        """The loss as a function, with the items drawn for the batch."""
        if self.name == "cross_entropy":
            return full_cross_entropy
        if drawn is None:
            return imported(self.name)
        if self.name == "sampled_softmax":
            return functools.partial(sampled_softmax, drawn=drawn.items, log_share=drawn.log_share)
        if self.name == "bpr":
            return functools.partial(bpr, drawn=drawn.items)
        share = min(1.0, self.negatives / max(n_items - 1, 1))
        power = share * (self.calibration * (1 - 1 / share) + 1 / share)
        return functools.partial(gbce, drawn=drawn.items, power=power)

    def prepare(
        self, key: jax.Array, n_items: int, frequencies: ItemFrequencies | None
    ) -> SummedLoss:
        """The loss of one batch, with the items drawn for it; see `draw` and `of`."""
        return self.of(self.draw(key, n_items, frequencies), n_items)


def cross_entropy(
    hidden: Float[Array, "B D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " B"],
    history: HistoryItems | None = None,
) -> Float[Array, " B"]:
    """Full softmax cross-entropy over every row of `table`, the padding row 0 included.

    The published code normalises over the padding row, too.

    Args:
      hidden: the states that predict the targets.
      table: the item table.
      targets: rows of the target items in the table.
      history: the items whose scores get the repeat bias; `None`: there is no such bias.

    Returns:
      The loss of each row, in nats, computed in at least float32.
    """
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    table = table.astype(hidden.dtype)
    scores = jnp.matmul(hidden, table.T, preferred_element_type=accumulate)
    # To take the target's score from `scores` would cost a [B, V] scatter in the backward pass.
    at_target = jnp.einsum(
        "bd,bd->b", hidden, lookup(table, targets), preferred_element_type=accumulate
    )
    if history is not None:
        history = history.of_rows(jnp.arange(len(hidden)))
        scores = add_history(scores, history)
        at_target += added_to(targets, history)
    return jax.nn.logsumexp(scores, axis=1) - at_target


def _at(mask, targets):
    return jnp.take_along_axis(mask, targets[:, None], axis=1)[:, 0]


def block_rows(items: int) -> int:
    """Number of rows whose scores are held at once; on a CPU they stay in its cache."""
    elements = 2**20 if target().platform == "cpu" else 2**26
    return max(8, min(1024, elements // items) // 8 * 8)


def few_scores(rows: int, items: int) -> bool:
    """Whether there are so few scores that to compute them in blocks would cost more."""
    return rows * items <= (2**23 if target().platform == "cpu" else 2**27)


def blocks(rows: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts arrays [N, ...] into [blocks, rows, ...]; zeros complete the last block."""
    count = -(-arrays[0].shape[0] // rows)

    def cut(x):
        padded = jnp.pad(x, [(0, count * rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(count, rows, *x.shape[1:])

    return tuple(map(cut, arrays))


@jax.custom_vjp
def summed_cross_entropy(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    history: HistoryItems | None = None,
) -> Float[Array, ""]:
    """sum_n weights[n] * cross_entropy(hidden[n], ...), without ever holding scores [N, V].

    The rows go through in blocks. The forward pass computes the gradient of a block together with
    its scores, so that no score is computed twice. Blocks after the last row with a weight are
    left out. `weights` and `targets` get no gradient.

    Args:
      hidden: the states that predict the targets.
      table: the item table, with the padding row 0.
      targets: rows of the target items in the table.
      weights: weight of each row, 0 for a row that does not count.
      history: the items whose scores get the repeat bias; `None`: there is no such bias.

    Returns:
      The sum, in nats, in at least float32.
    """
    return _forward(hidden, table, targets, weights, history)[0]


def _forward(hidden, table, targets, weights, history):
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    matmul = functools.partial(jnp.matmul, preferred_element_type=accumulate)
    narrow = table.astype(hidden.dtype)

    size = block_rows(table.shape[0])
    numbers = jnp.arange(len(hidden))
    rows = blocks(size, hidden, targets, weights.astype(accumulate), numbers)

    def block(i, carry):
        loss, d_hidden, d_table, d_bias, d_added = carry
        h, t, w, number = (x[i] for x in rows)
        scores = matmul(h, narrow.T)
        at_target = narrow[t]
        picked = jnp.einsum("nd,nd->n", h, at_target, preferred_element_type=accumulate)
        mask, at_end = None, None
        if history is not None:
            own = history.of_rows(number)
            mask, at_end = item_mask(own.items, len(table)), own.at_end
            scores += jnp.where(mask, history.repeat_bias, 0)
            picked += jnp.where(_at(mask, t), history.repeat_bias, 0)
        if at_end is not None:
            scores = add_at_end(scores, at_end)
            picked += at_end.added_to(t)
        top = scores.max(axis=1, keepdims=True)
        exp = jnp.exp(scores - top)
        total = exp.sum(axis=1)
        loss += jnp.sum(w * (jnp.log(total) + top[:, 0] - picked))
        d_scores = exp * (w / total)[:, None]
        if mask is not None:
            d_bias += jnp.sum(jnp.where(mask, d_scores, 0)) - jnp.sum(w * _at(mask, t))
        if at_end is not None:
            d_added = d_added.at[i].set(_at(d_scores, at_end.item) - w * (at_end.item == t))
        d_scores = d_scores.astype(h.dtype)
        d_block = matmul(d_scores, narrow) - w[:, None] * at_target
        d_hidden = d_hidden.at[i].set(d_block.astype(h.dtype))
        return loss, d_hidden, d_table + matmul(d_scores.T, h), d_bias, d_added

    zero, none = jnp.zeros((), accumulate), jnp.zeros_like(rows[2])
    start = zero, jnp.zeros_like(rows[0]), jnp.zeros(table.shape, accumulate), zero, none
    if len(rows[0]) == 1:
        loss, d_hidden, d_table, d_bias, d_added = block(0, start)
    else:
        end = jnp.max(jnp.where(weights != 0, jnp.arange(1, len(weights) + 1), 0))
        count = (end + size - 1) // size
        if target().platform == "gpu":
            count = len(rows[0])  # else the device would ask the host before every block
        loss, d_hidden, d_table, d_bias, d_added = jax.lax.fori_loop(0, count, block, start)
    weights = weights.astype(accumulate)
    d_table = add_at(d_table, targets, -weights[:, None] * hidden.astype(accumulate))
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
    no_gradient: Any = None
    d_history = None
    if history is not None:
        d_history = HistoryItems(no_gradient, d_bias.astype(history.repeat_bias.dtype))
        if history.at_end is not None:
            d_added = d_added.reshape(-1)[: len(hidden)].astype(history.at_end.added.dtype)
            d_history = d_history._replace(at_end=LastItem(no_gradient, d_added))
    return loss, (d_hidden, d_table.astype(table.dtype), d_history)


def _backward(gradients, d_loss):
    d_hidden, d_table, d_history = jax.tree.map(lambda g: g * d_loss.astype(g.dtype), gradients)
    return d_hidden, d_table, None, None, d_history


summed_cross_entropy.defvjp(_forward, _backward)


def full_cross_entropy(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    history: HistoryItems | None = None,
) -> Float[Array, ""]:
    """`summed_cross_entropy`; for few scores the plain form, which is faster there.

    The arguments are those of `summed_cross_entropy`.
    """
    if few_scores(len(hidden), len(table)):
        return jnp.sum(weights * cross_entropy(hidden, table, targets, history))
    return summed_cross_entropy(hidden, table, targets, weights, history)


def _scores(hidden, table, targets, drawn, history):
    """Scores of the targets [N] and of the drawn items [N,S], and whether the two differ [N,S]."""
    accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
    table = table.astype(hidden.dtype)
    at_target = jnp.einsum(
        "nd,nd->n", hidden, lookup(table, targets), preferred_element_type=accumulate
    )
    others = jnp.matmul(hidden, lookup(table, drawn).T, preferred_element_type=accumulate)
    if history is not None:
        own = history.of_rows(jnp.arange(len(hidden))).items
        repeats = (own == targets[:, None]).any(axis=1) & (targets > 0)
        at_target += jnp.where(repeats, history.repeat_bias, 0)
        others += jnp.where(_in_history(history, drawn, len(hidden)), history.repeat_bias, 0)
        if history.at_end is not None:
            at_target += history.at_end.added_to(targets)
            item, added = history.at_end
            others += jnp.where(item[:, None] == drawn, added[:, None], 0)
    return at_target, others, drawn != targets[:, None]


def _in_history(
    history: HistoryItems, drawn: Int[Array, " S"], rows: int
) -> Bool[Array, "{rows} S"]:
    """Whether each of the drawn items is in the history of each row of scores.

    Rows that share a history also share the work. To compare the history of every row with all
    drawn items would cost the length of the histories as many times.
    """
    here = history.items[:, :, None] == drawn
    if history.first is None or history.last is None:
        return here.any(axis=1)
    # The last position up to each one at which the item stands, -1 if there is none.
    position = jnp.arange(here.shape[1])[:, None]
    seen = jax.lax.cummax(jnp.where(here, position, -1), axis=1)
    row = jnp.arange(rows) // (rows // len(history.items))
    return seen[row, history.last] >= history.first[:, None]


def sampled_softmax(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    history: HistoryItems | None = None,
    *,
    drawn: Int[Array, " S"],
    log_share: Float[Array, " S"],
) -> Float[Array, ""]:
    """Cross-entropy over the target and the drawn items (Bengio & Senecal 2008).

    The score of a drawn item is lowered by the logarithm of the number of times that the item is
    expected among those drawn. The sum over the drawn items then estimates the sum over all.

    Args:
      hidden: the states that predict the targets.
      table: the item table.
      targets: rows of the target items in the table.
      weights: weight of each row.
      history: the items whose scores get the repeat bias; `None`: there is no such bias.
      drawn: rows of the drawn items. All targets share them. Where a target is among them, it is
        left out there.
      log_share: logarithm of the probability with which each of them is drawn.
    """
    at_target, others, different = _scores(hidden, table, targets, drawn, history)
    others = others - (log_share + jnp.log(len(drawn)))
    others = jnp.where(different, others, -jnp.inf)
    total = jax.nn.logsumexp(jnp.concatenate([at_target[:, None], others], axis=1), axis=1)
    return jnp.sum(weights * (total - at_target))


def gbce(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    history: HistoryItems | None = None,
    *,
    drawn: Int[Array, " S"],
    power: float,
) -> Float[Array, ""]:
    """Generalised binary cross-entropy (arXiv 2308.07192, section 5).

    The target's probability is sigmoid(score)^power. Other arguments are those of
    `sampled_softmax`.
    """
    at_target, others, different = _scores(hidden, table, targets, drawn, history)
    wrong = jnp.sum(jnp.where(different, jax.nn.softplus(others), 0), axis=1)
    return jnp.sum(weights * (power * jax.nn.softplus(-at_target) + wrong))


def bpr(
    hidden: Float[Array, "N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    history: HistoryItems | None = None,
    *,
    drawn: Int[Array, " S"],
) -> Float[Array, ""]:
    """Bayesian personalised ranking (arXiv 1205.2618): the mean of -log sigmoid(target - other).

    Arguments are those of `sampled_softmax`.
    """
    at_target, others, different = _scores(hidden, table, targets, drawn, history)
    losses = jnp.where(different, jax.nn.softplus(others - at_target[:, None]), 0)
    return jnp.sum(weights * losses.sum(1) / jnp.maximum(different.sum(1), 1))
