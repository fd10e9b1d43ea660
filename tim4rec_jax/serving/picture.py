"""Draws an explanation (`tim4rec_jax.serving.explain`) as one picture."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tim4rec_jax.files import atomic_write
from tim4rec_jax.serving.explain import Explanation

_FOR, _AGAINST, _PALE = "#4c78a8", "#d1495b", "#b9cbe0"
_INK, _GREY, _LINE, _EMPTY = "#1f2933", "#5f6b7a", "#c3ccd6", "#eef1f4"
_DECADES = 3  # how many powers of ten of a mask's entries have colours of their own
_UNITS = ((365 * 86_400, "y"), (86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))

# Sizes in inches: the margin, the heading, and the row of an event or an item; the widths of the
# labels, of the bars, of the space right of them and of the colour bar; the side of a mask, and the
# space between masks.
_EDGE, _HEAD, _ROW = 0.3, 1.15, 0.19
_LABELS, _BARS, _BETWEEN, _BAR = 2.8, 2.0, 0.85, 0.75
_SIDE, _GAP = 2.0, 0.12


def draw(found: Explanation, path: Path) -> None:
    """Draws the weights, the recommendations and the masks to a PNG file.

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
        """Axes given by their upper left corner and their size, in inches."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    _heading(figure, found, width, height)
    _weights(panel(_EDGE + _LABELS, _HEAD, _BARS, events), found)
    _recommendations(panel(left + 1.9, _HEAD, width - left - 1.9 - _EDGE - 0.5, best), found)
    if found.masks:
        _draw_masks(figure, *_mask_panels(panel, found, left, masks_top, side), found)
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def _mask_panels(panel, found: Explanation, left: float, top: float, side: float):
    """The axes of the masks, [layers, heads], and of their colour bar."""
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
    # One event, mostly the last one, may outweigh the others a hundredfold.
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
    """Writes small text that ends `points` right of a side of the panel (0: left, 1: right)."""
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
    # The scores are log-probabilities up to a constant, so the first one gives the others.
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
    return text.replace("$", r"\$")  # matplotlib would typeset a formula


def _span(seconds: int) -> str:
    """A time span in the largest unit that fits, such as `+3 d`."""
    size, unit = next((unit for unit in _UNITS if abs(seconds) >= unit[0]), _UNITS[-1])
    return f"{'-' if seconds < 0 else '+'}{abs(seconds) / size:.0f} {unit}"
