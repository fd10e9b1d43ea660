"""The picture of README.md: quality against the cost of training, from `results.csv`."""

import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks.results import Row, in_words, model_name, pick
from benchmarks.results_tables import RANKED, TABLES
from tim4rec_jax.commands.results import PROTOCOL

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Readable on white and on black pages: the picture brings its own paper.
PAPER, INK, GREY, OURS, OTHERS = "#fbfbf9", "#1f2328", "#6e7781", "#c2410c", "#33658a"
# The panels: their titles, and the tables of results whose rows are their points. A model that
# learns nothing costs far less than the others, so it has no point.
PANELS = {
    "ml-100k: no repeat bias": "ml-100k",
    "ml-100k: repeat bias, tuned alike": "ml-100k-tuned",
    "Beauty: no repeat bias, one seed": "beauty-pure",
    "KuaiRand slice: all additions, tuned alike": "kuairand-slice-tuned",
}


class Point(NamedTuple):
    """A model in a panel: processor seconds of a training, NDCG@10, deviation over seeds."""

    label: str
    cost: float
    quality: float
    deviation: float
    ours: bool


def points(rows: list[Row]) -> dict[str, list[Point]]:
    """The points of each panel. A training that has no cost in the file has none.

    The quality is the mean over most seeds. The cost is that of the same trainings, or where it was
    not measured the mean of other trainings of these settings.
    """
    panels = {}
    for title, table in PANELS.items():
        panels[title] = []
        for choice in TABLES[table].chosen:
            row = pick(rows, RANKED, choice)
            if row["model"] == "popularity":
                continue
            same = ("dataset", "variant", "settings", *PROTOCOL)
            costs = [
                float(other["train_cpu_s"])
                for other in ([row] if row["train_cpu_s"] else rows)
                if other["train_cpu_s"] and all(other[column] == row[column] for column in same)
            ]
            if costs:
                ours = row["model"] == "tim4rec"
                figures = float(row["ndcg@10"]), float(row["ndcg@10_sd"] or 0)
                panels[title].append(Point(model_name(row), statistics.mean(costs), *figures, ours))
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
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
        panels = list(axes.flat)
        for panel, (title, found) in zip(panels, points(rows).items(), strict=True):
            _panel(panel, title, found)
        figure.supylabel("NDCG@10, mean and deviation over seeds", fontsize=10)
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
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
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
    """Writes the names where they cover no other name, no point and no bar, and are not mistaken.

    Each name is moved to its best place beside the others, again and again until none moves.
    """
    figure = panel.get_figure()
    assert figure is not None
    pixels = figure.dpi / 72
    sizes, points, bars = [], [], []
    for point in found:
        text = panel.text(0, 0, point.label, fontsize=9, fontweight=_weight(point))
        sizes.append((text.get_window_extent().width, text.get_window_extent().height))
        text.remove()
        ends = [(point.cost, point.quality + sign * point.deviation) for sign in (-1, 1)]
        (x, low), (_, high) = panel.transData.transform(ends)
        points.append((x, (low + high) / 2))
        bars.append((x - 5, low - 4, x + 5, high + 4))
    frame = panel.get_window_extent()

    def box(number: int, shift: tuple[float, float]) -> tuple[float, ...]:
        """Left, bottom, right and top of a name; a shift to the left ends before its point."""
        (x, y), (width, height) = points[number], sizes[number]
        x, y = x + shift[0] * pixels, y + shift[1] * pixels
        left = x if shift[0] > 0 else x - width if shift[0] < 0 else x - width / 2
        return left, y - height / 2, left + width, y + height / 2

    def badness(number: int, shift: tuple[float, float]) -> float:
        mine = box(number, shift)
        others = [box(n, places[n]) for n in range(len(found)) if n != number]
        covered = sum(_overlap(mine, other) for other in [*bars, *others])
        outside = max(0, mine[2] - frame.x1 - 4) + max(0, frame.x0 - mine[0])
        distances = [_distance(mine, point) for point in points]
        mistaken = sum(distance < distances[number] + 4 for distance in distances) - 1
        return 10 * covered + 100 * outside + 40 * mistaken + distances[number]

    places = [(8.0, 0.0)] * len(found)
    for _ in range(20):
        before = list(places)
        for number in range(len(found)):
            places[number] = min(_SHIFTS, key=lambda shift: badness(number, shift))
        if places == before:
            break
    for point, (x, y) in zip(found, places, strict=True):
        far = abs(y) > 13
        panel.annotate(
            point.label,
            (point.cost, point.quality),
            xytext=(x, y),
            textcoords="offset points",
            ha="left" if x > 0 else "right" if x < 0 else "center",
            va="center",
            fontsize=9,
            fontweight=_weight(point),
            color=OURS if point.ours else INK,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7} if far else None,
        )


def _weight(point: Point) -> str:
    return "bold" if point.ours else "normal"


# Where a name may stand, in points from the middle of its point: beside it, above and below.
_HEIGHTS = (0.0, *(sign * y for y in (7.0, 13.0, 20.0, 28.0, 36.0, 45.0) for sign in (1, -1)))
_SHIFTS = [(x, y) for y in _HEIGHTS for x in (8.0, -8.0, 0.0) if x or abs(y) > 7]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes (left, bottom, right, top) share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def _distance(box: tuple[float, ...], point: tuple[float, float]) -> float:
    """From a point to the nearest edge of a box."""
    x = max(box[0] - point[0], 0, point[0] - box[2])
    y = max(box[1] - point[1], 0, point[1] - box[3])
    return (x * x + y * y) ** 0.5
