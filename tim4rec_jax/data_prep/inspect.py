"""Describes a prepared dataset: figures for the terminal and for `plot`."""

import datetime
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tim4rec_jax.data import Dataset
from tim4rec_jax.data.dataset import Chunk
from tim4rec_jax.errors import one_line

QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "max": 1.0}
# Gaps are counted in 20 bins for each power of ten, from 1 s to 3,000 years. The first bin holds
# ties.
GAP_BINS = np.concatenate([[0], np.logspace(0, 11, 221)])
_PIECE = 1 << 22  # events read at once
EARLY = 100_000_000  # seconds: in 1973, before there were logs of this kind
MANY_EVENTS = 5_000  # of one user
_LARGE_SHARE = 0.1  # of all events: a log that is small has no user with so many as above
_SPANS = ((365 * 86_400, "y"), (86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))


def statistics(ds: Dataset) -> dict:
    """Computes counts and quantiles of a dataset. Reads it piece by piece, three times.

    Args:
      ds: an open dataset.

    Returns:
      A dictionary with
        density: events / (users x items);
        lengths: the `QUANTILES` of events per user;
        gaps: the `QUANTILES` of seconds between neighbouring events of a user, to within 6 %;
        gap_counts: number of gaps in each of `GAP_BINS`;
        tied: share of gaps that are 0;
        tied_float32: the same after times are rounded to float32;
        first, last: times of the first and the last event in seconds;
        usual: the time from and until which nearly all events are, see `usual_times`;
        busy: number of events in each 80th of it.
    """
    gap_counts = np.zeros(len(GAP_BINS) - 1, np.int64)
    tied_float32 = 0
    first, last = np.iinfo(np.int64).max, 0
    for times, same_user in _pieces(ds):
        first, last = min(first, int(times.min())), max(last, int(times.max()))
        gap_counts += np.histogram(np.diff(times)[same_user], GAP_BINS)[0]
        tied_float32 += int((np.diff(times.astype(np.float32))[same_user] == 0).sum())
    usual = usual_times(ds)
    busy = np.zeros(80, np.int64)
    for chunk in _chunks(ds):
        for start in range(0, len(chunk.timestamps), _PIECE):
            part = chunk.timestamps[start : start + _PIECE]
            busy += np.histogram(part, len(busy), (usual[0], usual[1] + 1))[0]
    n_gaps = max(int(gap_counts.sum()), 1)
    return {
        "density": ds.n_events / (ds.n_users * ds.n_items),
        "lengths": [float(np.quantile(ds.lengths, q)) for q in QUANTILES.values()],
        "gaps": [_binned_quantile(gap_counts, q) for q in QUANTILES.values()],
        "gap_counts": gap_counts,
        "tied": gap_counts[0] / n_gaps,
        "tied_float32": tied_float32 / n_gaps,
        "first": first,
        "last": last,
        "usual": usual,
        "busy": busy,
    }


def usual_times(ds: Dataset) -> tuple[int, int]:
    """Returns the times from and until which nearly all events are.

    They are the first and the last of all, but for a few events that lie so far away (one in 2099)
    that the others would fill less than half of the time between. At most one event in a thousand
    counts as such at either end. Small datasets have none.
    """
    first, last = _ends(ds)
    few = ds.n_events // 1000 if ds.n_events >= 1000 else int(ds.n_events >= 20)
    if not few or first == last:
        return first, last
    edges = np.linspace(first, last + 1, (1 << 16) + 1)
    counts = np.zeros(len(edges) - 1, np.int64)
    for chunk in _chunks(ds):
        for start in range(0, len(chunk.timestamps), _PIECE):
            counts += np.histogram(chunk.timestamps[start : start + _PIECE], edges)[0]
    before = counts.cumsum()
    low = int(np.searchsorted(before, few, side="right"))
    high = int(np.searchsorted(before, ds.n_events - few))
    if high + 1 - low >= len(counts) / 2:
        return first, last
    # Events that are no farther from these times than they last are near.
    lasting, some = high + 1 - low, np.flatnonzero(counts)
    low = some[np.searchsorted(some, low - lasting)]
    high = some[np.searchsorted(some, high + lasting, side="right") - 1]
    return max(first, int(edges[low])), min(last, int(edges[high + 1]))


def doubts(ds: Dataset) -> list[str]:
    """Returns what is so unusual in a dataset that it may be a mistake, as whole sentences."""
    found = []
    first, last = _ends(ds)
    if last < EARLY:
        found.append(
            f"all events are before {day(EARLY)}, which is right only for a log that counts its "
            "time from its own start; see --time-unit"
        )
    start, end = usual_times(ds)
    far = sum(
        int(((chunk.timestamps < start) | (chunk.timestamps > end)).sum()) for chunk in _chunks(ds)
    )
    if far:
        ends = {f"the first is of {day(first)}": "--since"} if first < start else {}
        ends |= {f"the last is of {day(last)}": "--until"} if last > end else {}
        found.append(
            f"{far:,} of {ds.n_events:,} events {'are' if far > 1 else 'is'} far from all others, "
            f"which are from {day(start)} to {day(end)}; {' and '.join(ends)}; "
            f"{' and '.join(ends.values())} can leave out such events"
        )
    copies = sum(map(_copies, _chunks(ds), itertools.repeat(ds.offsets)))
    if copies > ds.n_events / 200:
        found.append(
            f"{copies:,} of {ds.n_events:,} events are copies of the event before, with the same "
            "user, item and time, as in exports that overlap; --deduplicate=exact leaves them out"
        )
    usual = np.median(ds.lengths)
    busy = (ds.lengths > max(MANY_EVENTS, 50 * usual)) | (
        ds.lengths > max(_LARGE_SHARE * ds.n_events, 10 * usual)
    )
    if busy.any():
        few, most, count = ds.lengths[busy].min(), ds.lengths.max(), int(busy.sum())
        who = "1 user has" if count == 1 else f"{count:,} users have"
        each = f"{most:,}" if few == most else f"{few:,} to {most:,}"
        busiest = one_line(ds.user_ids[int(ds.lengths.argmax())].as_py(), 40)
        what = (
            f"the id {busiest!r} may be of a program, or stand for nobody"
            if count == 1
            else f"they may be programs, or ids that stand for nobody, such as {busiest!r}"
        )
        found.append(
            f"{who} {each} events{' each' * (count > 1)}, "
            f"{ds.lengths[busy].sum() / ds.n_events:.0%} of all; {what}; --where can leave out "
            "such users"
        )
    return found


def print_doubts(ds: Dataset, console: Console) -> None:
    """Prints what `doubts` returns."""
    for doubt in doubts(ds):
        console.out(f"warning: {doubt}", style="yellow")


def _chunks(ds: Dataset) -> Iterator[Chunk]:
    """Yields the chunks; the memory of the file of each is given back behind it."""
    for chunk in ds.chunks:
        yield chunk
        chunk.release()


def _copies(chunk: Chunk, offsets: Int64[np.ndarray, " ends"]) -> int:
    """The number of events of a chunk that have item and time of the event before."""
    count, end = 0, chunk.start + len(chunk.items)
    for start in range(chunk.start, end, _PIECE):
        part = slice(start - chunk.start, min(start + _PIECE, end) + 1 - chunk.start)
        items, times = chunk.items[part], chunk.timestamps[part]
        same = (items[1:] == items[:-1]) & (times[1:] == times[:-1])
        users = slice(*np.searchsorted(offsets, (start + 1, start + len(items))))
        same[offsets[users] - start - 1] = False  # the first event of another user
        count += int(same.sum())
    return count


def _ends(ds: Dataset) -> tuple[int, int]:
    """The times of the first and of the last event."""
    ends = [(int(c.timestamps.min()), int(c.timestamps.max())) for c in _chunks(ds)]
    return min(first for first, _ in ends), max(last for _, last in ends)


def _pieces(ds: Dataset) -> Iterator[tuple[Int64[np.ndarray, " N"], Bool[np.ndarray, " M"]]]:
    """Yields the times of whole users, and which neighbouring times belong to the same user.

    The times of each user are sorted, because RecBole's order may differ from them by seconds.
    """
    for chunk in _chunks(ds):
        end = chunk.start + len(chunk.timestamps)
        user = int(np.searchsorted(ds.offsets, chunk.start))
        while ds.offsets[user] < end:
            until = min(ds.offsets[user] + _PIECE, end)
            after = max(int(np.searchsorted(ds.offsets, until, side="right")) - 1, user + 1)
            owner = np.repeat(np.arange(after - user), ds.lengths[user:after])
            times = chunk.timestamps[ds.offsets[user] - chunk.start :][: len(owner)]
            yield times[np.lexsort((times, owner))], owner[1:] == owner[:-1]
            user = after


def _binned_quantile(counts: Int64[np.ndarray, " bins"], q: float) -> float:
    if not counts.any():
        return 0.0
    place = int(np.searchsorted(counts.cumsum(), max(q * counts.sum(), 1)))
    return float(np.sqrt(GAP_BINS[place] * GAP_BINS[place + 1]))  # ties: 0


def print_statistics(ds: Dataset, figures: dict, console: Console) -> None:
    """Prints a dataset's figures, as `statistics` returns them."""
    table = Table(title=Text(one_line(ds.name)))
    table.add_column("")
    for label in QUANTILES:
        table.add_column(label, justify="right")
    table.add_row("events per user", *(f"{value:,.0f}" for value in figures["lengths"]))
    table.add_row("gap between events", *map(span, figures["gaps"]))
    console.print(table)
    console.out(
        f"{ds.n_users:,} users, {ds.n_items:,} items, {ds.n_events:,} events "
        f"(density {figures['density']:.3%})\n"
        f"{day(figures['first'])} to {day(figures['last'])} "
        f"({span(figures['last'] - figures['first'])}), order {ds.order}\n"
        f"same time as the event before: {figures['tied']:.1%}, "
        f"{figures['tied_float32']:.1%} after rounding to float32 (these are in the order of the "
        "source's rows)"
    )


def span(seconds: int | float) -> str:
    """Formats a duration in its largest fitting unit: `42 s`, `3.5 h`, `2.0 y`."""
    for size, unit in _SPANS:
        if seconds >= size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 and size > 1 else f"{value:.0f} {unit}"
    return "0 s"


def day(seconds: int) -> str:
    """Returns the date (UTC) of a unix time."""
    epoch = datetime.datetime(1970, 1, 1)
    return (epoch + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%d")
