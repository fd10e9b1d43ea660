"""The picture of README.md: quality against the cost of training, from `results.csv`."""

import hashlib
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks.results import COMPARED, MODELS, NO_BIAS, RANKED, Row, in_words, pick
from tim4rec_jax.commands.results import PROTOCOL

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Annotation

# Readable on white and on black pages: the picture brings its own paper.
PAPER, INK, GREY, OURS, OTHERS = "#fbfbf9", "#1f2328", "#6e7781", "#c2410c", "#33658a"
# The panels: title, dataset, variants, settings of the causal variant, settings of the others
# besides those of the comparison, and variants that keep the settings of their config.
PANELS = [
    (
        "ml-100k, without repeat bias",
        "ml-100k",
        "causal lrurec hstu mamba4rec ssd4rec tisasrec gru4rec bert4rec sasrec caser",
        NO_BIAS,
        NO_BIAS,
        "bert4rec caser",
    ),
    (
        "KuaiRand, a slice, with repeat and date bias",
        "kuairand-slice",
        "causal mamba4rec sasrec ssd4rec",
        "",
        "",
        "",
    ),
]


class Point(NamedTuple):
    """A model in a panel: processor seconds of a training, NDCG@10, deviation over seeds."""

    label: str
    cost: float
    quality: float
    deviation: float
    ours: bool


def points(rows: list[Row]) -> dict[str, list[Point]]:
    """The points of each panel. A training that has no cost in the file has none.

    The quality is the mean over most seeds, and the cost the mean of the trainings of these
    settings whose cost was measured.
    """
    panels = {}
    for title, dataset, variants, own, others, alone in PANELS:
        panels[title] = []
        for variant in variants.split():
            settings = own if variant == "causal" else f"{COMPARED[dataset]} {others}"
            settings = "" if variant in alone.split() else settings
            row = pick(rows, RANKED, (dataset, variant, settings))
            same = ("dataset", "variant", "settings", *PROTOCOL)
            costs = [
                float(other["train_cpu_s"])
                for other in rows
                if other["train_cpu_s"] and all(other[column] == row[column] for column in same)
            ]
            if costs:
                ours = row["model"] == "tim4rec"
                label = MODELS[row["model"]] + (" causal" if ours else "")
                figures = float(row["ndcg@10"]), float(row["ndcg@10_sd"] or 0)
                panels[title].append(Point(label, statistics.mean(costs), *figures, ours))
    return panels


def digest(rows: list[Row]) -> str:
    """Names what is drawn: two pictures with the same digest show the same points."""
    return hashlib.sha256(repr(points(rows)).encode()).hexdigest()


def draw(rows: list[Row], path: Path) -> None:
    """Draws a panel for each data set, with the digest of its points in the file."""
    settings: dict[Any, Any] = {
        "svg.hashsalt": "tim4rec",  # the same file whenever it is drawn
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": INK,
        "ytick.color": INK,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(settings):
        figure, panels = plt.subplots(1, len(PANELS), figsize=(9, 3.9), layout="constrained")
        for panel, (title, found) in zip(panels, points(rows).items(), strict=True):
            _panel(panel, title, found)
        panels[0].set_ylabel("NDCG@10, mean and deviation of 3 seeds")
        figure.supxlabel("processor seconds of the training, all threads", fontsize=10)
        figure.draw_without_rendering()
        for panel, found in zip(panels, points(rows).values(), strict=True):
            _label(panel, found)
        path.parent.mkdir(parents=True, exist_ok=True)
        words = {"Date": None, "Title": in_words(RANKED), "Description": digest(rows)}
        figure.savefig(path, metadata=words)
        plt.close(figure)


def _panel(panel: Axes, title: str, found: Sequence[Point]) -> None:
    for point in found:
        color = OURS if point.ours else OTHERS
        panel.errorbar(
            point.cost, point.quality, point.deviation, fmt="o", ms=6, color=color, elinewidth=1.2
        )
    panel.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    panel.set_xscale("log")
    panel.margins(x=0.16, y=0.1)
    low, high = panel.get_xlim()
    steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)
    ticks = [step * 10**power for power in range(6) for step in steps]
    ticks = [tick for tick in ticks if low <= tick <= high]
    panel.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:.4f}".removeprefix("0"))
    panel.grid(color=GREY, alpha=0.18, linewidth=0.8)


def _label(panel: Axes, found: Sequence[Point]) -> None:
    """Puts each name where it covers no other name, no point and no bar."""
    figure = panel.get_figure()
    assert figure is not None
    taken = []
    for point in found:
        ends = [(point.cost, point.quality + sign * point.deviation) for sign in (-1, 1)]
        (left, low), (right, high) = panel.transData.transform(ends)
        taken.append((left - 5, low - 5, right + 5, high + 5))
    for point in sorted(found, key=lambda each: -each.quality):
        best = None
        for note in _places(panel, point):
            box = note.get_window_extent()
            edges = (box.x0 - 1, box.y0 - 1, box.x1 + 1, box.y1 + 1)
            covered = sum(_overlap(edges, other) for other in taken)
            inside = panel.get_window_extent()
            covered += 1e3 * (box.x1 > inside.x1 + 4 or box.x0 < inside.x0)
            if best is None or covered < best[0]:
                if best:
                    best[1].remove()
                best = covered, note, edges
            else:
                note.remove()
            if covered == 0:
                break
        assert best is not None
        taken.append(best[2])


def _places(panel: Axes, point: Point) -> Iterator[Annotation]:
    """Labels of a point, one after the other: beside it, above, below, and farther away."""
    for distance in (8, 13, 19, 26):
        for side, shift in (
            *(("left", (distance, 0)), ("right", (-distance, 0))),
            *(("left", (distance, 9)), ("left", (distance, -9))),
            *(("right", (-distance, 9)), ("right", (-distance, -9))),
            *(("center", (0, distance)), ("center", (0, -distance))),
        ):
            yield panel.annotate(
                point.label,
                (point.cost, point.quality),
                xytext=shift,
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=9,
                fontweight="bold" if point.ours else "normal",
                color=OURS if point.ours else INK,
            )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)
