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
(`tim4rec_jax.ssd.reference`), which is where time acts.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int64
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tim4rec_jax.data import time_gaps
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_write
from tim4rec_jax.scoring import HistoryItems, add_repeat_bias
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.command import add_history_flags, read_history
from tim4rec_jax.serving.compiled_model import CompiledModel
from tim4rec_jax.serving.history import Events, read_histories
from tim4rec_jax.serving.recommender import Recommendations, Recommender

# ---- serving.explain
# Why a model recommends what it does: the time-aware masks, and each event's weight.
#
# `python -m tim4rec_jax.serving explain --workdir RUN --history ITEM@TIME ... --out picture.png`
#
# **Weight of an event**: by how much the log-probability of the top recommendation (softmax over
# the catalogue) falls if the event had not happened. The model is run again on the history
# without it, the times of the others as they were. Exact, in one batch, and the same question
# for every model. A gradient would answer for an infinitesimally weaker event, which no history
# holds; the last layer's mask row would leave out what reaches the prediction through earlier
# layers, through the skip connection and through time itself. As with any such question,
# weights do not add up to anything: two events that say the same are each dispensable.
#
# **Mask**: entry [l, s] of a head is what event s counts for in event l before either's content
# (`tim4rec_jax.ssd.reference`), which is where time acts.


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


def _log_probabilities(
    engine: CompiledModel, histories: Events, at: int | None, item: int
) -> np.ndarray:
    """Log-probability of an item after each of some histories."""
    hidden = engine.encode(histories)
    rows = len(histories.offsets) - 1
    hidden = engine.condition_on_time(hidden, histories, None if at is None else np.full(rows, at))

    history = None
    if engine.offset is not None:
        history = HistoryItems(jnp.asarray(histories.padded_items()), engine.offset)

    @jax.jit
    def score(hidden, table, history):
        scores = jnp.matmul(hidden, table.T, precision=jax.lax.Precision.HIGHEST)
        scores = add_repeat_bias(scores.astype(jnp.float32), history)
        return jax.nn.log_softmax(scores[:, 1:])[:, item - 1]

    return np.asarray(score(hidden[:rows], engine.table, history))


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
    from tim4rec_jax.serving.explain import draw

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


# ---- serving.picture
# An explanation in one picture.

_FOR, _AGAINST, _PALE = "#4c78a8", "#d1495b", "#b9cbe0"
_INK, _GREY, _LINE, _EMPTY = "#1f2933", "#5f6b7a", "#c3ccd6", "#eef1f4"
_DECADES = 3  # of the mask that are told apart
_UNITS = ((365 * 86_400, "y"), (86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))

# Inches.
_EDGE, _HEAD, _ROW = 0.3, 1.15, 0.19
_LABELS, _BARS, _BETWEEN, _BAR = 2.8, 2.0, 0.85, 0.75
_SIDE, _GAP = 2.0, 0.12  # of a mask, between masks


def draw(found: Explanation, path: Path) -> None:
    """Draws weights, recommendations and masks to a PNG file.

    Raises:
      UserError: the file cannot be written.
    """
    layers, heads = len(found.masks), len(found.masks[0]) if found.masks else 0
    side = min(_SIDE, 10.0 / max(heads, 1))
    events, best = _ROW * len(found.events), _ROW * len(found.titles)
    masks_top = _HEAD + best + 0.95
    left = _EDGE + _LABELS + _BARS + _BETWEEN
    width = left + max(heads * (side + _GAP), 4.5) + _BAR + _EDGE
    height = max(_HEAD + events + 0.6, masks_top + layers * (side + _GAP) + 0.2)
    figure = Figure(figsize=(width, height), dpi=150)

    def panel(x: float, y: float, w: float, h: float) -> Axes:
        """Axes by their upper left corner, in inches."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    _heading(figure, found, width, height)
    _weights(panel(_EDGE + _LABELS, _HEAD, _BARS, events), found)
    _recommendations(panel(left + 1.9, _HEAD, width - left - 1.9 - _EDGE - 0.5, best), found)
    if found.masks:
        _draw_masks(figure, *_mask_panels(panel, found, left, masks_top, side), found)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _mask_panels(panel, found: Explanation, left: float, top: float, side: float):
    """Axes for the masks, [layers, heads], and for their color bar."""
    layers, heads = len(found.masks), len(found.masks[0])
    masks = [
        panel(left + head * (side + _GAP), top + layer * (side + _GAP), side, side)
        for layer in range(layers)
        for head in range(heads)
    ]
    bar = panel(left + heads * (side + _GAP) + 0.08, top, 0.1, side)
    return np.reshape(np.array(masks), (layers, heads)), bar


def _heading(figure: Figure, found: Explanation, width: float, height: float) -> None:
    def line(y, text, size, color):
        figure.text(_EDGE / width, 1 - y / height, text, size=size, color=color, va="top")

    line(0.2, f"Why “{_short(found.titles[0], 70)}” comes first", 15, _INK)
    unknown = found.recommendations.unknown
    left_out = f" · {unknown} events with unknown items left out" if unknown else ""
    line(0.53, f"{found.name} · the last {len(found.events)} events{left_out}", 9, _GREY)


def _weights(panel: Axes, found: Explanation) -> None:
    rows = range(len(found.events))
    colors = [_FOR if weight >= 0 else _AGAINST for weight in found.weights]
    panel.barh(rows, found.weights, color=colors, height=0.7)
    panel.axvline(0, color=_GREY, lw=0.8)
    _list(panel, found.events, 30, "Weight of each event")
    # One event, mostly the last, may outweigh the others a hundredfold.
    highest = max(float(np.abs(found.weights).max()), 1e-6)
    panel.set_xscale("asinh", linear_width=highest / 100)
    panel.set_xticks([])
    panel.set_xticks([], minor=True)
    panel.set_xlabel(
        "how far the log-probability falls without it\n(asinh scale)", size=7.5, color=_GREY
    )
    first = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=int(found.timestamps[0]))
    passed = [f"{first:%Y-%m-%d}", *map(_span, np.diff(found.timestamps).tolist())]
    for row, weight, gap in zip(rows, found.weights, passed, strict=True):
        _beside(panel, row, 1.0, 30, f"{weight:+.2f}")
        _beside(panel, row, 0.0, -158, gap)


def _beside(panel: Axes, row: int, x: float, points: int, text: str) -> None:
    """Small text that ends some points from a side of the panel (0: left, 1: right)."""
    panel.annotate(
        text,
        (x, row),
        (points, 0),
        xycoords=panel.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="center_baseline",
        size=6.5,
        color=_GREY,
    )


def _recommendations(panel: Axes, found: Explanation) -> None:
    # Scores are log-probabilities up to a constant.
    scores = np.array(found.recommendations.scores)
    shares = found.probability * np.exp(scores - scores[0])
    panel.barh(range(len(shares)), shares, color=[_FOR, *[_PALE] * (len(shares) - 1)], height=0.7)
    for row, share in enumerate(shares):
        panel.annotate(
            f"{share:.2%}",
            (share, row),
            (3, 0),
            textcoords="offset points",
            va="center_baseline",
            size=6.5,
            color=_GREY,
        )
    _list(panel, found.titles, 28, "Recommended")
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
    panel.spines["left"].set(visible=True, color=_GREY)


def _draw_masks(figure: Figure, panels: np.ndarray, bar: Axes, found: Explanation) -> None:
    caption = "what each event (column) counts for in each later one (row)"
    for y, text, size, color in ((24, "Time-aware masks", 10, _INK), (9, caption, 7.5, _GREY)):
        panels[0, 0].annotate(
            text,
            (0, 1),
            (0, y),
            xycoords="axes fraction",
            textcoords="offset points",
            size=size,
            color=color,
        )
    highest = max(float(mask.max()) for mask in found.masks)
    lowest = highest / 10**_DECADES
    norm = LogNorm(lowest, highest, clip=True)
    for (layer, head), panel in np.ndenumerate(panels):
        mask = found.masks[layer][head]
        future = np.triu(np.ones(mask.shape, bool), 1)
        shown = np.ma.array(np.maximum(mask, lowest), mask=future)
        panel.imshow(shown, norm=norm, cmap="Blues", interpolation="nearest")
        panel.set(xticks=[], yticks=[], facecolor=_EMPTY)
        panel.spines[:].set_visible(False)
        panel.text(
            0.97,
            0.96,
            f"layer {layer + 1}, head {head + 1}",
            ha="right",
            va="top",
            size=7.5,
            color=_GREY,
            transform=panel.transAxes,
        )
    figure.colorbar(ScalarMappable(norm, "Blues"), cax=bar)
    bar.spines["outline"].set_visible(False)
    bar.tick_params(labelsize=7, colors=_GREY, which="both", width=0.5)


def _list(panel: Axes, labels: list[str], length: int, title: str) -> None:
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.set_yticks(range(len(labels)), [_short(label, length) for label in labels])
    panel.tick_params(axis="y", length=0, labelcolor=_INK, labelsize=7.5)
    panel.set_title(title, size=10, color=_INK, loc="left")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color(_LINE)


def _short(text: str, length: int) -> str:
    text = text if len(text) <= length else text[: length - 1].rstrip() + "…"
    return text.replace("$", r"\$")  # no formulas


def _span(seconds: int) -> str:
    """`+3 d`: in the largest unit that fits."""
    size, unit = next((unit for unit in _UNITS if abs(seconds) >= unit[0]), _UNITS[-1])
    return f"{'-' if seconds < 0 else '+'}{abs(seconds) / size:.0f} {unit}"
