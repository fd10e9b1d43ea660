"""Explains a recommendation: how much each event of the history counts, and the time-aware masks.

The **weight of an event** is how far the log-probability of the top recommendation (softmax over
the catalogue) falls if the event had not happened. The model runs again on the history without
that event, with the times of the other events as they were. This is exact, takes one batch, and
asks the same question of every model. A gradient would answer for an event that is weaker by an
infinitesimal amount, and no history holds such an event. The last row of a mask would miss what
reaches the prediction through earlier layers, through the skip connection and through time itself.
The weights do not add up to anything: of two events that say the same, each can be left out.

Entry [l, s] of the **mask** of a head is what event s counts for in event l before the content of
either event is considered (`tim4rec_jax.ssd.reference`). That is where time acts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Int64

from tim4rec_jax.data import time_gaps
from tim4rec_jax.errors import UserError
from tim4rec_jax.scoring import add_history, history_bias
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import CompiledModel
from tim4rec_jax.serving.history import Events, read_histories
from tim4rec_jax.serving.recommender import Recommendations, Recommender


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """The explanation of the top recommendation for one history.

    Attributes:
      name: the name of the dataset.
      events: the titles, or ids where there are none, of the events that the model sees.
      timestamps: the times of these events, in whole seconds since 1970.
      weights: the weight of each event in nats; positive if it speaks for the recommendation.
      masks: the time-aware masks of each layer; empty for a model without masks.
      recommendations: the best items for the whole history.
      titles: the titles, or ids, of these items.
      probability: the probability of the top recommendation.
    """

    name: str
    events: list[str]
    timestamps: Int64[np.ndarray, " L"]
    weights: Float[np.ndarray, " L"]
    masks: list[Float[np.ndarray, "H L L"]]
    recommendations: Recommendations
    titles: list[str]
    probability: float


def explain(
    recommender: Recommender,
    items: Sequence[Any],
    timestamps: Sequence[int],
    *,
    at: int | None = None,
) -> Explanation:
    """Explains the top recommendation for a history.

    Args:
      recommender: the model and its catalogue.
      items: the original ids, oldest first.
      timestamps: their times, in whole seconds since 1970.
      at: the moment of the prediction, for models that know it.

    Raises:
      UserError: times fall, the model knows fewer than two of the events, or nothing is left to
        recommend.
    """
    model, catalogue = recommender.model, recommender.catalogue
    history, _ = read_histories([(items, timestamps)], catalogue, sort=False)
    if len(history.items) < 2:
        raise UserError(
            f"the model knows {len(history.items)} of the {len(items)} items; to explain takes 2 "
            "or more"
        )
    found = recommender.recommend(items, timestamps, at=at)
    if not found.items:
        raise UserError("the history holds every item that the model knows, so none is recommended")
    top = int(catalogue.indices(found.items[:1])[0])
    log_probabilities = _log_probabilities(model, without_each(history, model.max_length), at, top)
    last = slice(-model.max_length, None)
    known, times = history.items[last], history.timestamps[last]
    return Explanation(
        name=catalogue.metadata["name"],
        events=_titles(catalogue, [catalogue.ids[item - 1] for item in known]),
        timestamps=times,
        weights=log_probabilities[0] - log_probabilities[1:],
        masks=_masks(model, known, times),
        recommendations=found,
        titles=_titles(catalogue, found.items),
        probability=float(np.exp(log_probabilities[0])),
    )


def without_each(history: Events, last: int) -> Events:
    """The history itself, then the history without each of its `last` events in turn."""
    length = len(history.items)
    count = min(last, length)
    kept = np.ones((1 + count, length), bool)
    kept[np.arange(1, 1 + count), np.arange(length - count, length)] = False
    _, columns = np.nonzero(kept)
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    return Events(history.items[columns], history.timestamps[columns], offsets)


def _log_probabilities(
    model: CompiledModel, histories: Events, at: int | None, item: int
) -> Float[np.ndarray, " B"]:
    """The log-probability of an item after each history."""
    rows = len(histories.offsets) - 1
    hidden = model.encode(histories, None if at is None else np.full(rows, at))
    history = None
    if (bias := history_bias(model.sequence_model)) is not None:
        items = np.pad(histories.padded_items(), ((0, len(hidden) - rows), (0, 0)))
        history = bias.of(items)
    return np.asarray(_log_probability(hidden, model.table, history, item))[:rows]


@jax.jit
def _log_probability(hidden, table, history, item):
    scores = jnp.matmul(hidden, table.T, precision=jax.lax.Precision.HIGHEST)
    scores = add_history(scores.astype(jnp.float32), history)
    return jax.nn.log_softmax(scores[:, 1:])[:, item - 1]


def _masks(
    model: CompiledModel, items: Int[np.ndarray, " L"], timestamps: Int64[np.ndarray, " L"]
) -> list[Float[np.ndarray, "H L L"]]:
    length = len(items)
    times = np.zeros((1, model.max_length), np.int64)
    times[0, :length] = timestamps
    lengths = np.array([length], np.int32)
    gaps = time_gaps(times, lengths, model.convention)
    masks = _model_masks(model.sequence_model, items[None], lengths, gaps)
    return [np.asarray(mask)[0] for mask in masks]


_model_masks = nnx.jit(lambda model, *inputs: model.masks(*inputs))


def _titles(catalogue: Catalogue, ids: Sequence[str]) -> list[str]:
    return [catalogue.title(item) or item for item in ids]
