"""Why a model recommends what it does: the time-aware masks, and each event's weight.

`python -m tim4rec_jax.serving explain --workdir RUN --history ITEM@TIME ... --out picture.png`

**Weight of an event**: by how much the log-probability of the top recommendation (softmax over
the catalogue) falls if the event had not happened. The model is run again on the history
without it, the times of the others as they were. Exact, in one batch, and the same question
for every model. A gradient would answer for an infinitesimally weaker event, which no history
holds; the last layer's mask row would leave out what reaches the prediction through earlier
layers, through the skip connection and through time itself. As with any such question,
weights do not add up to anything: two events that say the same are each dispensable.

**Mask**: entry [l, s] of a head is what event s counts for in event l before either's content
(`tim4rec_jax.ssd.mask`), which is where time acts.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int64

from tim4rec_jax.data import time_gaps
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.ranking import Seen, add_offset
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.command import add_history_flags, read_history
from tim4rec_jax.serving.engine import Engine
from tim4rec_jax.serving.history import Events, read_histories
from tim4rec_jax.serving.recommender import Recommendations, Recommender


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain` finds out about one history.

    Attributes:
      name: of the dataset.
      events: titles, or ids where there are none, of the events that the model sees.
      timestamps: their times.
      weights: of each event in the top recommendation, in nats; positive: it speaks for it.
      masks: of each layer.
      recommendations: the best items for the whole history.
      titles: theirs, or ids.
      probability: of the top recommendation.
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
    workdir: Path,
    items: Sequence[Any],
    timestamps: Sequence[int],
    *,
    at: int | None = None,
    dataset: Path | None = None,
) -> Explanation:
    """Explains the top recommendation for a history.

    Args:
      workdir: a run directory.
      items: original ids, oldest first.
      timestamps: whole seconds since 1970.
      at: moment of the prediction, for models that know it.
      dataset: the prepared dataset, if it has moved since the training.

    Raises:
      UserError: the run or the dataset is missing or damaged, times fall, or the model knows
        fewer than two of the events.
    """
    recommender = Recommender.load(workdir, dataset=dataset)
    engine, catalogue = recommender.engine, recommender.catalogue
    (known, times, _), _ = read_histories([(items, timestamps)], catalogue, sort=False)
    if len(known) < 2:
        raise UserError(
            f"the model knows {len(known)} of the {len(items)} items; to explain takes 2 or more"
        )
    found = recommender.recommend(items, timestamps, at=at)
    top = int(catalogue.indices(found.items[:1])[0])
    window = slice(-engine.max_length, None)
    log_probability = _log_probabilities(
        engine, without_each(known, times, engine.max_length), at, top
    )
    return Explanation(
        name=catalogue.metadata["name"],
        events=_titles(catalogue, [catalogue.ids[item - 1] for item in known[window]]),
        timestamps=times[window],
        weights=log_probability[0] - log_probability[1:],
        masks=_masks(engine.model, known[window], times[window], engine.convention),
        recommendations=found,
        titles=_titles(catalogue, found.items),
        probability=float(np.exp(log_probability[0])),
    )


def without_each(items: np.ndarray, timestamps: np.ndarray, last: int) -> Events:
    """The history itself, and the history without each of its `last` events in turn."""
    count = min(last, len(items))
    kept = np.ones((1 + count, len(items)), bool)
    kept[np.arange(1, 1 + count), np.arange(len(items) - count, len(items))] = False
    _, columns = np.nonzero(kept)
    offsets = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    return Events(items[columns], timestamps[columns], offsets)


def _log_probabilities(engine: Engine, histories: Events, at: int | None, item: int) -> np.ndarray:
    """Log-probability of an item after each of some histories."""
    hidden = engine.encode(histories)
    rows = len(histories.offsets) - 1
    hidden = engine.last_touch(hidden, histories, None if at is None else np.full(rows, at))

    seen = None
    if engine.offset is not None:
        seen = Seen(jnp.asarray(histories.padded_items()), engine.offset)

    @jax.jit
    def score(hidden, table, seen):
        scores = jnp.matmul(hidden, table.T, precision=jax.lax.Precision.HIGHEST)
        scores = add_offset(scores.astype(jnp.float32), seen, 0)
        return jax.nn.log_softmax(scores[:, 1:])[:, item - 1]

    return np.asarray(score(hidden[:rows], engine.table, seen))


def _masks(model: Any, items, timestamps, convention) -> list[np.ndarray]:
    length = len(items)
    times = np.zeros((1, model.max_length), np.int64)
    times[0, :length] = timestamps
    lengths = np.array([length], np.int32)
    gaps = time_gaps(times, lengths, convention)
    masks = nnx.jit(lambda model, *inputs: model.masks(*inputs))(model, items[None], lengths, gaps)
    return [np.asarray(mask)[0] for mask in masks]


def _titles(catalogue: Catalogue, ids: Sequence[str]) -> list[str]:
    return [catalogue.title(item) or item for item in ids]


def add_command(subparsers: Any) -> None:
    """Adds `explain` to the command line."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "explain",
        help="draw what the top recommendation for a history rests on",
        description="Draws each event's weight in the top recommendation and the time-aware "
        "mask of every layer and head.",
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="directory of a run")
    add_history_flags(parser)
    add("--out", type=Path, required=True, metavar="FILE.png", help="the picture")
    add("--at", type=int, metavar="TIME", help="moment of the prediction, for models that know it")
    add("--dataset", type=Path, help="the prepared dataset, if it has moved since the training")
    parser.set_defaults(run=_run)


def _run(flags: argparse.Namespace) -> int:
    # Drawing takes a while to import.
    from tim4rec_jax.serving.picture import draw

    items, timestamps = read_history(flags)
    found = explain(flags.workdir, items, timestamps, at=flags.at, dataset=flags.dataset)
    draw(found, flags.out)
    print(f"top recommendation: {found.titles[0]} (probability {found.probability:.2%})")
    for place in np.argsort(-np.abs(found.weights), kind="stable")[:5]:
        print(f"{found.weights[place]:+.3f}  {found.events[place]}")
    if found.recommendations.unknown:
        print(f"left out: {found.recommendations.unknown} events with items unknown to the model")
    print(f"wrote {flags.out}")
    return 0
