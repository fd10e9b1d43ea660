"""Draws a prepared dataset as one picture."""

import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tim4rec_jax.data import Dataset
from tim4rec_jax.data_prep.inspect import GAP_BINS, span
from tim4rec_jax.errors import one_line
from tim4rec_jax.files import atomic_write

_FILL, _GREY = "#4c78a8", "#5f6b7a"
_NOTE = {"color": "#d1495b", "fontsize": 8}
_TICKS = {1: "1 s", 60: "1 min", 3_600: "1 h", 86_400: "1 d", 2_592_000: "30 d", 31_536_000: "1 y"}


def plot(ds: Dataset, figures: dict, path: Path) -> None:
    """Draws events per user, gaps, popularity of items and events over time.

    Args:
      ds: an open dataset.
      figures: what `inspect.statistics` returns for it.
      path: the PNG file to write.

    Raises:
      UserError: the file cannot be written.
    """
    spacing = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(10, 6.2), layout=spacing, dpi=150)
    panels = figure.subplots(2, 2).flat
    sizes = f"{ds.n_users:,} users · {ds.n_items:,} items · {ds.n_events:,} events"
    title = f"{one_line(ds.name, 60)}    {sizes}"
    figure.suptitle(title, fontsize=13, color="#1f2933", parse_math=False)
    for panel, draw in zip(panels, (_lengths, _gaps, _popularity, _activity), strict=True):
        draw(panel, ds, figures)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8, colors=_GREY, which="both")
        panel.title.set(fontsize=10, color="#1f2933")
        for label in (panel.xaxis.label, panel.yaxis.label):
            label.set(fontsize=8, color=_GREY)
    with atomic_write(path) as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the font lacks a letter of a name
        figure.savefig(file, format="png")


def _lengths(panel: Axes, ds: Dataset, figures: dict) -> None:
    shortest, _, median, _, longest = figures["lengths"]
    wide = longest > 20 * shortest
    spaced = np.geomspace if wide else np.linspace
    edges = np.unique(spaced(shortest, longest + 1, 45).astype(int))
    panel.hist(ds.lengths, edges.tolist(), color=_FILL)
    panel.set(title="Events per user", ylabel="users", xscale="log" if wide else "linear")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    _mark(panel, median, f"median {median:,.0f}")


def _gaps(panel: Axes, ds: Dataset, figures: dict) -> None:
    # A logarithmic axis has no place for ties, so a note tells their share.
    counts = figures["gap_counts"][1:].reshape(-1, 2).sum(1)
    edges = GAP_BINS[1::2]
    seen = np.flatnonzero(counts)
    if seen.size:
        part = slice(seen[0], seen[-1] + 1)
        panel.stairs(counts[part], edges[part.start : part.stop + 1], fill=True, color=_FILL)
    panel.set(title="Time since the user's event before", xscale="log", ylabel="events")
    low, high = panel.get_xlim()
    ticks = {at: label for at, label in _TICKS.items() if low <= at <= high}
    panel.set_xticks(list(ticks), list(ticks.values()))
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    _leave_room(panel)
    text = f"not drawn: {figures['tied']:.0%} at the very same time"
    panel.annotate(text, (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", **_NOTE)


def _popularity(panel: Axes, ds: Dataset, figures: dict) -> None:
    counts = np.sort(ds.item_counts)[::-1]
    panel.plot(np.arange(1, len(counts) + 1), counts, color=_FILL, lw=2)
    decades = 10 ** np.floor(np.log10(counts[-1])), 10 ** np.ceil(np.log10(counts[0] + 1))
    panel.set(title="Popularity", xscale="log", yscale="log", ylim=decades)
    panel.set(xlabel="items, most popular first", ylabel="events")
    top = counts[: max(len(counts) // 100, 1)].sum() / counts.sum()
    text = f"top 1 % of items: {top:.0%} of events"
    panel.annotate(text, (0.04, 0.06), xycoords="axes fraction", **_NOTE)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:,.0f}")
        axis.set_minor_formatter("")


def _activity(panel: Axes, ds: Dataset, figures: dict) -> None:
    start, end = figures["usual"]
    edges = np.linspace(start, end + 1, len(figures["busy"]) + 1)
    panel.stairs(figures["busy"], edges / 86_400, fill=True, color=_FILL)
    panel.set(title="Events over time", ylabel=f"events in {span(edges[1] - edges[0])}")
    locator = AutoDateLocator()
    panel.xaxis.set_major_locator(locator)
    panel.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    panel.yaxis.set_major_formatter("{x:,.0f}")
    if far := ds.n_events - int(figures["busy"].sum()):
        _leave_room(panel)
        text = f"not drawn: {far:,} far away"
        panel.annotate(text, (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", **_NOTE)


def _mark(panel: Axes, at: float, text: str) -> None:
    _leave_room(panel)
    panel.axvline(at, color=_NOTE["color"], lw=1.2)
    panel.annotate(
        text,
        (at, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(5, 0),
        textcoords="offset points",
        va="top",
        **_NOTE,
    )


def _leave_room(panel: Axes) -> None:
    """Makes room for a line of text at the top of a panel."""
    panel.set_ylim(0, panel.get_ylim()[1] * 1.12)
