"""Makes a dataset whose best possible scores are known, with and without the time.

A user follows one interest at a time and consumes its items, popular ones first. Within a
session, with gaps of minutes, the interest stays. After a long gap of a day or two, the user takes
one more item of the old interest and then turns to another one. The interest of the next item
therefore follows from the last item and from the gap *before* that last item:

    gap before the last item short:  next item from the interest of the last item
    gap before the last item long:   next item from the interest that comes after it

This holds with probability `FOCUS`. Otherwise the next item is any item of the catalogue. A gap is
long with probability `LONG_GAP`, independently of everything else. The gap before an item does not
influence that item, only the one after it. The items so far say nothing about the last gap, so both
ceilings are exact. A model that sees times ranks by the probability given the interest and the gap.
A model that sees only items ranks by the average of that probability over the gap. Both rankings
are Bayes-optimal for Hit and NDCG.

The *effect* of time is a dial from 0 to 1, which is 1 above. An interest changes with probability
`LONG_GAP` whatever the effect is. At 0 it does so after long and short gaps alike, so that the time
says nothing. In between, the chance moves in proportion: after a short gap it is LONG_GAP (1 -
effect), after a long one 1 - (1 - LONG_GAP) (1 - effect). What items alone say is the same for all
effects, so only the ceiling of the models that see times moves.

Times are seconds since the first visit of the user, not unix times. In the published time encoding
the first padding position holds minus the last time and is normalised together with the gaps. A
unix time there would make the gaps vanish. Below 2**24 seconds float32 is exact as well.
"""

import argparse
import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int, Int64
from rich.console import Console
from rich.table import Table

from tim4rec_jax.data_prep import writer
from tim4rec_jax.data_prep.database import connect
from tim4rec_jax.data_prep.duckdb_engine import DuckDBEngine
from tim4rec_jax.errors import UserError

FOCUS = 0.9
LONG_GAP = 0.4
ITEMS_PER_INTEREST = 12
DECAY = 0.8  # popularity of an interest's next item relative to the one before
SHORT = (60, 600)  # seconds
LONG = (86_400, 172_800)
LENGTHS = (10, 30)  # events of a user
TOP = 10


def conditionals(
    n_items: int, effect: int | float = 1
) -> tuple[Int[np.ndarray, " V"], Float[np.ndarray, "2 C V"]]:
    """Returns the interest of each item and the probability of each next item.

    Args:
      n_items: size of the catalogue, V; it is split into C interests.
      effect: of time, from 0 to 1.

    Returns:
      The interest of each item, [V], and the probability of each next item, [2, C, V], given
      whether the gap before the last item was long, and given the interest of the last item.
    """
    n_interests = n_items // ITEMS_PER_INTEREST
    interest = np.arange(n_items) * n_interests // n_items
    rank = np.arange(n_items) - np.searchsorted(interest, interest)
    within = (interest == np.arange(n_interests)[:, None]) * DECAY**rank
    within /= within.sum(1, keepdims=True)
    following = np.roll(within, -1, axis=0)
    # The chance of another interest after a short and after a long gap.
    change = LONG_GAP * (1 - effect), 1 - (1 - LONG_GAP) * (1 - effect)
    given_gap = np.stack([(1 - chance) * within + chance * following for chance in change])
    return interest, FOCUS * given_gap + (1 - FOCUS) / n_items


def generate(
    n_users: int, n_items: int, seed: int, effect: int | float = 1
) -> tuple[Int64[np.ndarray, "U N"], Int64[np.ndarray, "U N"], Int64[np.ndarray, " U"]]:
    """Draws the events of all users.

    Args:
      n_users: number of users, U.
      n_items: number of items; at least two interests' worth.
      seed: of the random numbers.
      effect: of time, from 0 to 1. It changes items alone: times and lengths are those of the seed.

    Returns:
      Items [U, N] from 0, times [U, N] in seconds, and lengths [U], the number of valid events.
    """
    random = np.random.default_rng(seed)
    interest, probabilities = conditionals(n_items, effect)
    cumulative = probabilities.cumsum(-1)
    shape = (n_users, LENGTHS[1])
    long = random.random(shape) < LONG_GAP
    long[:, 0] = False  # there is no gap before the first event
    gaps = np.where(long, random.integers(*LONG, shape), random.integers(*SHORT, shape))
    items = np.empty(shape, np.int64)
    items[:, 0] = random.integers(n_items, size=n_users)
    for event in range(1, shape[1]):
        given = cumulative[long[:, event - 1].astype(int), interest[items[:, event - 1]]]
        drawn = (random.random((n_users, 1)) > given).sum(1)
        items[:, event] = np.minimum(drawn, n_items - 1)
    return items, gaps.cumsum(1), random.integers(LENGTHS[0], LENGTHS[1] + 1, n_users)


def ceilings(
    last_items: Int64[np.ndarray, " U"],
    last_gap_long: Bool[np.ndarray, " U"],
    n_items: int,
    effect: int | float = 1,
) -> dict[str, dict[str, float]]:
    """Returns the best expected metrics over given histories.

    Args:
      last_items: last item of each history, from 0.
      last_gap_long: whether the gap before it was long.
      n_items: size of the catalogue.
      effect: of time, from 0 to 1.

    Returns:
      The entries `with_time` and `time_blind`, each with `hit@10` and `ndcg@10`.
    """
    interest, probabilities = conditionals(n_items, effect)
    blind = np.average(probabilities, axis=0, weights=[1 - LONG_GAP, LONG_GAP])
    discounts = 1 / np.log2(np.arange(2, TOP + 2))
    context = last_gap_long.astype(int), interest[last_items]
    result = {}
    for name, belief in (
        ("with_time", probabilities),
        ("time_blind", np.broadcast_to(blind, probabilities.shape)),
    ):
        best = np.argsort(-belief, axis=-1, kind="stable")[..., :TOP]
        chances = np.take_along_axis(probabilities, best, axis=-1)[context]
        result[name] = {
            f"hit@{TOP}": float(chances.sum(-1).mean()),
            f"ndcg@{TOP}": float((chances @ discounts).mean()),
        }
    return result


def oracle(items, times, lengths, n_items: int, effect: int | float = 1) -> dict:
    """Returns the ceilings of the leave-one-out splits for the events that `generate` returned.

    Returns:
      The entries `test` and `valid`, each as `ceilings` returns it.
    """
    users = np.arange(len(items))
    result = {}
    for split, last in (("test", lengths - 2), ("valid", lengths - 3)):
        long = times[users, last] - times[users, last - 1] >= LONG[0]
        result[split] = ceilings(items[users, last], long, n_items, effect)
    return result


def write(flags: argparse.Namespace, folder: Path) -> dict:
    """Generates the dataset that the flags ask for into the empty `folder`.

    Raises:
      UserError: there are too few users or items, or too many for the memory.
    """
    if flags.users < 1 or flags.items < 2 * ITEMS_PER_INTEREST:
        raise UserError(
            f"--users {flags.users} --items {flags.items}: at least 1 user and "
            f"{2 * ITEMS_PER_INTEREST} items (two interests) are needed"
        )
    # Tables of [U, N] events, of [U, V] probabilities, and of [2, C, V] with C in proportion to V.
    events, tables = 40 * LENGTHS[1] * flags.users, 10 * flags.users * flags.items
    needed, free = events + tables + 6 * flags.items**2, _free_memory()
    if needed > free:
        raise UserError(
            f"--users {flags.users} --items {flags.items} takes about {needed / 1e9:,.1f} GB of "
            f"memory and {free / 1e9:,.1f} GB are free; ask for fewer"
        )
    items, times, lengths = generate(flags.users, flags.items, flags.seed, flags.effect)
    keep = np.arange(items.shape[1]) < lengths[:, None]
    users = np.broadcast_to(np.arange(flags.users)[:, None], items.shape)
    tables = {
        "events": {
            "row": np.arange(keep.sum()),
            "user": users[keep],
            "item": items[keep],
            "time": times[keep] * 1_000_000_000,
        },
        "users": {"number": np.arange(flags.users), "id": _ids("u", flags.users)},
        "items": {"number": np.arange(flags.items), "id": _ids("i", flags.items)},
    }
    metadata = {
        "name": flags.name,
        "seed": flags.seed,
        "effect": flags.effect,
        "oracle": oracle(items, times, lengths, flags.items, flags.effect),
        "sources": [],
        "prepared_by": "synthetic",
    }
    with contextlib.closing(connect(folder.parent)) as con:
        for name, columns in tables.items():
            con.register("columns", pa.table(columns))
            con.execute(f"CREATE TABLE {name} AS SELECT * FROM columns")
        return writer.write(DuckDBEngine(con), folder, metadata, order="exact")


def _free_memory() -> int:
    """Returns the bytes of memory that a program can have, as far as the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _ids(letter: str, count: int) -> list[str]:
    return [f"{letter}{number:0{len(str(count - 1))}d}" for number in range(count)]


def print_oracle(metadata: dict, console: Console) -> None:
    """Prints the best expected scores."""
    table = Table("best expected score", "valid HR@10", "NDCG@10", "test HR@10", "NDCG@10")
    for key, label in (("with_time", "seeing items and times"), ("time_blind", "items only")):
        scores = [metadata["oracle"][split][key] for split in ("valid", "test")]
        table.add_row(label, *(f"{value:.4f}" for score in scores for value in score.values()))
    console.print(table)
