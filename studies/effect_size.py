"""How much must time be worth before a model that knows it is better?

    python -m studies.effect_size

The synthetic generator has a dial for the effect of time, from 0, where gaps say nothing, to 1. The
items alone say the same at each setting, and the best possible figures are known with time and
without. The causal model is trained with time and without, and its gain stands beside what is
possible.

Real logs have no such dial. There the users are split by the gap before the last event of the
history, which is the last one that the model sees before it predicts. The trainings are those of
`studies.high_dimension`.
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from studies import high_dimension
from studies.report import COLORS, Estimate, Results, Row, dots, join, named, panels, select, short
from studies.study import Arm, Study, Training, by_arm, difference, main
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data_prep import synthetic
from tim4rec_jax.data_prep.__main__ import main as data_prep
from tim4rec_jax.errors import run_main
from tim4rec_jax.run import read_settings

WIDTH = 32
TIMED = f"causal {WIDTH}"
USERS, ITEMS = 1000, 120
EFFECTS = {f"effect-{effect:g}": effect for effect in (0.0, 0.1, 0.25, 0.5, 1.0)}
# The longest gap of each group of users, in seconds.
GAPS = {
    "up to a minute": 60.0,
    "up to an hour": 3600.0,
    "up to a day": 86_400.0,
    "up to 30 days": 30 * 86_400.0,
    "longer": np.inf,
}


def arms(dataset: str, quick: bool) -> list[Arm]:
    """The causal model with time and without."""
    if quick:
        return [high_dimension.quick_arm(False), high_dimension.quick_arm(True)]
    if dataset not in EFFECTS:
        return [high_dimension.arm(dataset, WIDTH, "causal", time) for time in (False, True)]
    settings = (
        *(f"model.hidden_size={WIDTH}", "model.num_layers=1", "model.conv_path=hardswish"),
        *("train.epochs=12", "train.patience=12", "data.max_length=32", "data.buckets=(32,)"),
    )
    return [
        Arm(
            TIMED if time else f"{TIMED} without time",
            dataset,
            "quickstart:causal",
            settings if time else (*settings, "model.is_time=False"),
            {"width": WIDTH, "encoding": "causal", "time": "yes" if time else "no"},
            against=f"{TIMED} without time" if time else "",
            data=dataset,
        )
        for time in (False, True)
    ]


def make_log(folder: Path, quick: bool) -> None:
    """Prepares a synthetic log with the effect that its name says."""
    del quick
    sizes = ["--users", str(USERS), "--items", str(ITEMS), "--effect", str(EFFECTS[folder.name])]
    data_prep(["synthetic", *sizes, "--out", str(folder)])


@cache
def worth(dataset: str) -> float:
    """What knowing the time is worth in test NDCG@10 on a synthetic log, at best."""
    effect = EFFECTS[dataset]
    events = synthetic.generate(USERS, ITEMS, 0, effect)
    best = synthetic.oracle(*events, ITEMS, effect)["test"]
    return best["with_time"]["ndcg@10"] - best["time_blind"]["ndcg@10"]


def last_gaps(dataset: Dataset) -> np.ndarray:
    """The seconds between the last two events of each history before the test; NaN with fewer."""
    times = np.concatenate([chunk.timestamps for chunk in dataset.chunks])
    ends = dataset.offsets[:-1] + dataset.splits.test - 1  # the last event of the history
    known = dataset.splits.test >= 2
    gaps = np.full(dataset.n_users, np.nan)
    gaps[known] = times[ends[known]] - times[ends[known] - 1]
    return gaps


def measure(found: list[Training]) -> Iterator[Row]:
    """The gain of time by the last gap, on real logs."""
    trainings = by_arm(found)
    for (dataset, name), timed in trainings.items():
        first = next(iter(timed.values()))
        blind = trainings.get((dataset, first.arm.against))
        if dataset in EFFECTS or not blind:
            continue
        log = open_dataset(read_settings(first.folder / "run" / "config.json").dataset)
        gaps = last_gaps(log)[log.splits.test >= 1]  # as the gains: users with a target
        group = np.where(np.isnan(gaps), -1, np.searchsorted(list(GAPS.values()), gaps))
        for number, words in enumerate(GAPS):
            members = group == number
            gains = [{s: t.gains[members] for s, t in each.items()} for each in (timed, blind)]
            if members.sum() > 1 and (row := difference(*gains)):
                level = np.mean([gain.mean() for gain in gains[1].values()])
                what = {"dataset": dataset, "arm": name, "seed": "", "what": "gain", "at": words}
                yield {**what, "without": float(level), **row}


def _by_gap(results: Results, dataset: str) -> dict[str, Estimate]:
    rows = {row["at"]: row for row in select(results.details, dataset=dataset, what="gain")}
    return {
        words: Estimate(rows[words]["difference"], rows[words]["se"], rows[words]["seeds"])
        for words in GAPS
        if words in rows
    }


def _dial(results: Results) -> dict[str, Estimate]:
    found = {dataset: results.difference(dataset, TIMED) for dataset in EFFECTS}
    return {dataset: gap for dataset, gap in found.items() if gap}


def verdict(results: Results) -> str:
    """Whether the model gains nearly all, and on which real logs long gaps matter."""
    gains = _dial(results)
    if not gains:
        return ""
    strongest = max(gains, key=lambda name: EFFECTS[name])
    share, error = (100 * x / worth(strongest) for x in gains[strongest][:2])
    some = [name for name, gap in gains.items() if gap.clear and gap.value > 0]
    if not some:
        return "No: the gain of time is clear at none of the effects."
    least = min(some, key=lambda name: EFFECTS[name])
    text = (
        f"At the strongest effect the model gains {share:.0f} ± {error:.0f} % of what time is worth"
    )
    if least != strongest:
        weak = 100 * gains[least].value / worth(least)
        text += f", at {EFFECTS[least]:g} {weak:.0f} %"
    text += ", and below that nothing clear"
    if share > 100:
        text += ". More than all is chance of the users and the seeds"
    real = [d for d in results.datasets if d not in EFFECTS and _by_gap(results, d)]
    clear = [
        named(d)
        for d in real
        if any(gap.clear and gap.value > 0 for gap in _by_gap(results, d).values())
    ]
    if real:
        text += (
            f". On real logs the last gap tells for whom time is of use on {join(clear)}"
            if clear
            else f". On none of {len(real)} real logs do users of any last gap gain clearly"
        )
    return f"{text}."


def answer(results: Results) -> list[str]:
    """The gain at each setting of the dial, where it becomes clear, and real logs by gap."""
    sentences, gains = [], _dial(results)
    if gains:
        told = [
            f"{gap} of {short(worth(name))} at {EFFECTS[name]:g}" for name, gap in gains.items()
        ]
        sentences.append(
            f"Of what time is worth in NDCG@10 the causal model gains, by the effect: {join(told)}."
        )
        clear = [name for name, gap in gains.items() if gap.clear and gap.value > 0]
        sentences.append(
            f"The weakest effect with a clear gain on {USERS:,} users is {EFFECTS[clear[0]]:g}, "
            f"where time is worth {short(worth(clear[0]))}."
            if clear
            else "None of these gains is clear."
        )
        if (none := gains.get("effect-0")) and none.clear:
            sentences.append(f"Where time says nothing, knowing it changes NDCG@10 by {none}.")
    for dataset in (name for name in results.datasets if name not in EFFECTS):
        if groups := _by_gap(results, dataset):
            told = [f"{words} {gap}" for words, gap in groups.items()]
            clear = [words for words, gap in groups.items() if gap.clear]
            verdict = f"clear for {join(clear)}" if clear else "clear for none of them"
            sentences.append(
                f"On {named(dataset)} time changes the NDCG@10 of users whose last gap is "
                f"{join(told)}: {verdict}."
            )
    return sentences or ["No model has been run both with time and without."]


def draw(results: Results, figure: Any) -> None:
    """The gain against what time is worth, and on real logs the gain by the last gap."""
    gains = _dial(results)
    real = {d: groups for d in results.datasets if (groups := _by_gap(results, d))}
    titles = ["synthetic logs"] * bool(gains) + [named(dataset) for dataset in real]
    if not titles:
        return
    drawn = panels(figure, titles)
    if gains:
        possible = [worth(dataset) for dataset in gains]
        values, errors = zip(*((g.value, 2 * g.error) for g in gains.values()), strict=True)
        drawn[0].plot([0, max(possible)], [0, max(possible)], color=COLORS[1], label="all of it")
        drawn[0].errorbar(possible, values, errors, fmt="o", capsize=3, label="causal model")
        drawn[0].set_xlabel("what time is worth in NDCG@10")
        drawn[0].set_ylabel("gain of time ± 2 standard errors")
        drawn[0].legend(frameon=False)
    for panel, groups in zip(drawn[len(drawn) - len(real) :], real.values(), strict=True):
        dots(panel, list(groups), list(groups.values()), COLORS[0])
        panel.axvline(0, color=COLORS[1], linewidth=1)
        panel.set_xlabel("gain of time in NDCG@10 ± 2 standard errors")


STUDY = Study(
    name="effect_size",
    question="How much must time be worth before a model that knows it is better?",
    hypothesis="The model gains nearly all that there is to gain, so a log on which time gains "
    "nothing is one where time says little. On real logs the gain is that of users with long gaps.",
    hours={**{name: 0.1 for name in EFFECTS}, "ml100k": 0.2, "beauty": 1.5, "kuairand": 1.5},
    datasets=(*EFFECTS, "ml100k", "beauty", "kuairand"),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
    measure=measure,
    make={name: make_log for name in EFFECTS},
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
