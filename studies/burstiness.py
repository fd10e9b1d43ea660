"""Does time help bursty users more than steady ones?

    python -m studies.burstiness

The burstiness of a user is the coefficient of variation of the gaps between the events: the
standard deviation over the mean. It is 0 for a clock, 1 for a Poisson process, and above 1 where
events come in bursts. On real logs the users are split into five groups of rising burstiness, and
the same models are compared in each. The trainings are those of `studies.high_dimension`.

The synthetic logs have the same rule and the same rate, and differ in the process that makes the
gaps. After a gap that is among the longest 40 % of its process, the interest of a user changes, as
in `tim4rec_jax.data_prep.synthetic`.

    poisson    exponential gaps
    hawkes     a self-exciting process: each event makes the next ones more likely for a while
    sessions   60 % short and 40 % long gaps, with nothing in between
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from studies import high_dimension
from studies.report import COLORS, Estimate, Results, Row, join, named, panels, select
from studies.study import Arm, Study, Training, by_arm, difference, main
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data_prep import synthetic
from tim4rec_jax.data_prep.__main__ import main as data_prep
from tim4rec_jax.errors import run_main
from tim4rec_jax.run import read_settings

GROUPS, WIDTH = 5, 32
USERS, ITEMS, EVENTS = 1000, 120, 20
RATE = 1 / 50_000.0  # events a second, of all processes
PROCESSES = ("poisson", "hawkes", "sessions")
# The share of the events of the Hawkes process that other events cause, and how long (1 / s) the
# excitement lasts.
BRANCHING, FORGETTING = 0.7, 1 / 5_000.0
# The gaps of a session are as long as in `tim4rec_jax.data_prep.synthetic` on the mean.
SESSION = 330.0


def process_gaps(name: str, random: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Gaps in seconds [U, N] of a process whose rate is `RATE`.

    The Hawkes process has the intensity `base + sum over events of jump e^(-FORGETTING age)`. The
    next event of such a process is the first of two: one of the constant rate, and one of the part
    that fades, which may never come. Both times have a closed form.
    """
    users, events = shape
    if name == "poisson":
        return random.exponential(1 / RATE, shape)
    if name == "sessions":
        long = random.random(shape) < synthetic.LONG_GAP
        pause = (1 / RATE - (1 - synthetic.LONG_GAP) * SESSION) / synthetic.LONG_GAP
        spread = random.uniform(0.5, 1.5, shape)
        return np.where(long, pause, SESSION) * spread
    base, jump = RATE * (1 - BRANCHING), BRANCHING * FORGETTING
    excitement, gaps = np.full(users, RATE * BRANCHING), []
    for _ in range(100 + events):  # the first hundred forget how it began
        steady = random.exponential(1 / base, users)
        left = 1 - FORGETTING * random.exponential(1.0, users) / np.maximum(excitement, 1e-30)
        fading = np.where(left > 0, -np.log(np.maximum(left, 1e-300)) / FORGETTING, np.inf)
        gap = np.minimum(steady, fading)
        excitement = excitement * np.exp(-FORGETTING * gap) + jump
        gaps.append(gap)
    return np.stack(gaps[100:], axis=1)


@cache
def generate(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The items [U, N], times [U, N] and long gaps [U, N] of a synthetic log."""
    random = np.random.default_rng(0)
    shape = (USERS, EVENTS)
    gaps = np.maximum(np.round(process_gaps(name, random, shape)), 1).astype(np.int64)
    long = gaps > np.quantile(gaps, 1 - synthetic.LONG_GAP)
    long[:, 0] = False  # there is no gap before the first event
    interest, probabilities = synthetic.conditionals(ITEMS)
    cumulative = probabilities.cumsum(-1)
    items = np.empty(shape, np.int64)
    items[:, 0] = random.integers(ITEMS, size=USERS)
    for event in range(1, EVENTS):
        given = cumulative[long[:, event - 1].astype(int), interest[items[:, event - 1]]]
        drawn = (random.random((USERS, 1)) > given).sum(1)
        items[:, event] = np.minimum(drawn, ITEMS - 1)
    return items, gaps.cumsum(1), long


@cache
def ceilings(name: str) -> tuple[float, float]:
    """The best NDCG@10 with time, and that of a model that knows no time and no earlier items."""
    items, _, long = generate(name)
    best = synthetic.ceilings(items[:, -2], long[:, -2], ITEMS)
    return best["with_time"]["ndcg@10"], best["time_blind"]["ndcg@10"]


def room(name: str) -> float:
    """What knowing the time is worth in NDCG@10 on a synthetic log, next to the last item alone."""
    with_time, without = ceilings(name)
    return with_time - without


def make_log(folder: Path, quick: bool) -> None:
    """Prepares a synthetic log."""
    del quick
    items, times, _ = generate(folder.name)
    source = folder.with_name(f"{folder.name}.parquet")
    users = np.repeat(np.arange(USERS), EVENTS)
    columns = {"user_id": users, "item_id": items.ravel(), "timestamp": times.ravel()}
    pq.write_table(pa.table(columns), source)
    data_prep(["table", str(source), "--k-core", "1", "--out", str(folder)])


def variation(dataset: Dataset) -> np.ndarray:
    """The coefficient of variation of each user's gaps before the test; NaN with fewer than two."""
    ends, found = dataset.splits.test, np.full(dataset.n_users, np.nan)
    times = np.concatenate([chunk.timestamps for chunk in dataset.chunks])
    for user, start in enumerate(dataset.offsets[:-1]):
        gaps = np.diff(times[start : start + ends[user]])
        if len(gaps) > 1 and gaps.mean() > 0:
            found[user] = gaps.std() / gaps.mean()
    return found


def arms(dataset: str, quick: bool) -> list[Arm]:
    """The causal model with time and without."""
    if quick:
        return [high_dimension.quick_arm(False), high_dimension.quick_arm(True)]
    if dataset not in PROCESSES:
        return [high_dimension.arm(dataset, WIDTH, "causal", time) for time in (False, True)]
    settings = (
        *(f"model.hidden_size={WIDTH}", "model.num_layers=1", "model.conv_path=hardswish"),
        *("train.epochs=12", "train.patience=12", "data.max_length=20", "data.buckets=(20,)"),
    )
    return [
        Arm(
            f"causal {WIDTH}" + ("" if time else " without time"),
            dataset,
            "quickstart:causal",
            settings if time else (*settings, "model.is_time=False"),
            {"width": WIDTH, "encoding": "causal", "time": "yes" if time else "no"},
            against=f"causal {WIDTH} without time" if time else "",
            data=dataset,
        )
        for time in (False, True)
    ]


def measure(found: list[Training]) -> Iterator[Row]:
    """The gain of time in each group of users."""
    for (dataset, name), trained in by_arm(found).items():
        against = next(iter(trained.values())).arm.against
        theirs = by_arm(found).get((dataset, against))
        if not theirs:
            continue
        settings = next(iter(trained.values())).folder / "run" / "config.json"
        log = open_dataset(read_settings(settings).dataset)
        burstiness = variation(log)[log.splits.test >= 1]  # as the gains: users with a target
        known = burstiness[~np.isnan(burstiness)]
        cuts = np.quantile(known, np.arange(1, GROUPS) / GROUPS)
        group = np.where(np.isnan(burstiness), -1, np.searchsorted(cuts, burstiness, "right"))
        for number in range(GROUPS):
            members = group == number
            gains = [{s: t.gains[members] for s, t in each.items()} for each in (trained, theirs)]
            if members.sum() > 1 and (row := difference(*gains)):
                level = np.mean([gain.mean() for gain in gains[1].values()])
                cv = {"cv": float(np.median(burstiness[members])), "without": float(level)}
                what = {"dataset": dataset, "arm": name, "seed": "", "what": "gain"}
                yield {**what, "at": f"group {number + 1}", **cv, **row}


def _groups(results: Results, dataset: str) -> list[tuple[float, Estimate]]:
    rows = select(results.details, dataset=dataset, what="gain")
    found = [(r["cv"], Estimate(r["difference"], r["se"], r["seeds"])) for r in rows]
    return sorted(found, key=lambda pair: pair[0])


def _apart(groups: list[tuple[float, Estimate]]) -> Estimate:
    """How much more time gives the most bursty users than the steadiest."""
    low, high = groups[0][1], groups[-1][1]
    return Estimate(high.value - low.value, np.hypot(high.error, low.error), low.seeds)


def verdict(results: Results) -> str:
    """Whether time helps bursty users more, on real logs."""
    real = {d: _groups(results, d) for d in results.datasets if d not in PROCESSES}
    known = {d: _apart(groups) for d, groups in real.items() if len(groups) > 1}
    if not known:
        return ""
    more = [named(d) for d, gap in known.items() if gap.clear and gap.value > 0]
    if more:
        return f"Yes on {join(more)}, of {len(known)} real logs."
    return (
        f"No: on none of {len(known)} real logs does time help bursty users clearly more than "
        "steady ones."
    )


def answer(results: Results) -> list[str]:
    """The most bursty users against the most steady ones, then the processes."""
    sentences = []
    for dataset in (name for name in results.datasets if name not in PROCESSES):
        groups = _groups(results, dataset)
        if len(groups) > 1:
            (steady, low), (bursty, high) = groups[0], groups[-1]
            sentences.append(
                f"On {named(dataset)} time changes the NDCG@10 of the most bursty fifth of the "
                f"users (variation {bursty:.1f}) by {high}, and that of the steadiest "
                f"(variation {steady:.1f}) by {low}: {_apart(groups).compared()} for bursty users."
            )
    shares, levels, above = [], [], []
    for process in PROCESSES:
        gap = results.difference(process, f"causal {WIDTH}")
        plain = results.level(dataset=process, arm=f"causal {WIDTH} without time")
        if gap and plain:
            share, error = 100 * gap.value / room(process), 100 * gap.error / room(process)
            shares.append(f"{share:.0f} ± {error:.0f} % ({process})")
            over = Estimate(plain.value - ceilings(process)[1], plain.error, plain.seeds)
            levels.append(f"{over} ({process})")
            above += [process] * (over.clear and over.value > 0)
    if shares:
        sentences.append(
            "On the synthetic logs of equal rate and equal rule, time gains this share of what it "
            f"is worth next to the last item alone: {join(shares)}."
        )
        sentences.append(
            "The model without time differs by this from the best NDCG@10 that the last item alone "
            f"allows: {join(levels)}. "
            + (f"It is clearly above it in {join(above)}: there " if above else "Nowhere ")
            + "the earlier items tell it something about the last gap."
        )
    return sentences or ["No model has been run both with time and without."]


def draw(results: Results, figure: Any) -> None:
    """The gain by burstiness on real logs, and its share of the possible on synthetic ones."""
    real = [d for d in results.datasets if d not in PROCESSES and _groups(results, d)]
    shares = {p: results.difference(p, f"causal {WIDTH}") for p in PROCESSES}
    made = {process: gap for process, gap in shares.items() if gap}
    titles = [named(dataset) for dataset in real] + ["synthetic logs"] * bool(made)
    if not titles:
        return
    drawn = panels(figure, titles)
    for panel, dataset in zip(drawn, real, strict=False):
        groups = _groups(results, dataset)
        values, errors = zip(*((g.value, 2 * g.error) for _, g in groups), strict=True)
        panel.errorbar([cv for cv, _ in groups], values, errors, fmt="o", capsize=3)
        panel.axhline(0, color=COLORS[1], linewidth=1)
        panel.set_xlabel("variation of the gaps, median of the group")
        panel.set_ylabel("gain of time ± 2 standard errors")
    if made:
        values = [100 * gap.value / room(process) for process, gap in made.items()]
        errors = [200 * gap.error / room(process) for process, gap in made.items()]
        drawn[-1].bar(list(made), values, yerr=errors, color=COLORS[2], capsize=3)
        drawn[-1].set_ylabel("gain of time, % of the possible")


STUDY = Study(
    name="burstiness",
    question="Does time help bursty users more than steady ones?",
    hypothesis="Yes on real logs, where the gaps of steady users say little. On the synthetic logs "
    "the process matters little, because the rule is the same, but gaps near the limit between "
    "short and long, which sessions do not have, are easy to mistake.",
    hours={"ml100k": 0.2, "beauty": 1.5, "kuairand": 1.5, **{p: 0.05 for p in PROCESSES}},
    datasets=("ml100k", "beauty", "kuairand", *PROCESSES),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
    measure=measure,
    make={process: make_log for process in PROCESSES},
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
