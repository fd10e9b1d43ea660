"""Which width for which data?

    python -m studies.width

The width of the model, the state of a head and the number of heads are changed one at a time around
the usual ones, on data sets of different size, density and length. The best width of a data set
then stands against its number of events. The rule of thumb is a power law, best width = c events^e,
and it is judged on each data set by the rule that the other data sets give.

The synthetic logs have 300, 1,000 and 3,000 users of the same kind, so that only the size differs.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from studies.report import COLORS, Estimate, Results, Row, join, named, panels, select
from studies.study import QUICK, QUICK_SSD, Arm, Study, Training, main, overridden
from tim4rec_jax.data import open_dataset
from tim4rec_jax.data_prep.__main__ import main as data_prep
from tim4rec_jax.errors import run_main
from tim4rec_jax.run import read_settings

WIDTHS, STATES, HEAD_WIDTHS = (16, 32, 64, 128, 256), (8, 32, 128), (16, 32, 64)
USUAL = {"width": 64, "state": 32, "head_width": 32}
SYNTHETIC = {"users-300": 300, "users-1000": 1000, "users-3000": 3000}


def arms(dataset: str, quick: bool) -> list[Arm]:
    """The usual model, and those that differ from it in one size."""
    made, usual, found = dataset in (*SYNTHETIC, QUICK), _usual(dataset), []
    for size in [usual, usual | {"width": 8}] if quick else _sizes(dataset):
        settings = (
            f"model.hidden_size={size['width']}",
            f"model.d_state={size['state']}",
            f"model.head_dim={size['head_width']}",
            "model.conv_path=hardswish",
        )
        if quick:
            settings = overridden(QUICK_SSD, settings)
        found.append(
            Arm(
                _name(size),
                dataset,
                "quickstart:causal" if made else f"{dataset}:causal",
                settings,
                size,
                against="" if size == usual else _name(usual),
                data=dataset if made else "",
            )
        )
    return found


def _usual(dataset: str) -> dict[str, int]:
    return {"width": 4, "state": 4, "head_width": 8} if dataset == QUICK else USUAL


def _name(size: dict[str, int]) -> str:
    return f"{size['width']} x {size['state']} x {size['head_width']}"


def _sizes(dataset: str) -> list[dict[str, int]]:
    found = [USUAL | {"width": width} for width in WIDTHS]
    if dataset not in SYNTHETIC:
        found += [USUAL | {"state": state} for state in STATES]
        found += [USUAL | {"head_width": width} for width in HEAD_WIDTHS]
    return [size for number, size in enumerate(found) if size not in found[:number]]


def make_log(folder: Path, quick: bool) -> None:
    """Prepares a synthetic log of so many users."""
    del quick
    users = str(SYNTHETIC[folder.name])
    data_prep(["synthetic", "--users", users, "--items", "120", "--out", str(folder)])


def measure(found: list[Training]) -> Iterator[Row]:
    """The number of training events of each data set."""
    for dataset, training in {t.arm.dataset: t for t in found}.items():
        config = read_settings(training.folder / "run" / "config.json")
        events = int(open_dataset(config.dataset).splits.train.sum())
        where = {"dataset": dataset, "arm": "", "seed": ""}
        yield {**where, "what": "events in training", "at": "", "value": events}


def events_of(results: Results) -> dict[str, int]:
    """The number of training events of each data set with results."""
    rows = select(results.details, what="events in training")
    return {row["dataset"]: row["value"] for row in rows}


def by_width(results: Results, dataset: str) -> dict[int, Estimate]:
    """Validation NDCG@10 by width, other sizes as usual; the error is that of the test."""
    found = {}
    for width in sorted({row["width"] for row in results.select(dataset=dataset)}):
        sizes: dict[str, Any] = {**_usual(dataset), "width": width}
        valid = results.level("valid_ndcg@10", dataset=dataset, **sizes)
        test = results.level(dataset=dataset, **sizes)
        if valid and test:
            found[width] = Estimate(valid.value, test.error, valid.seeds)
    return found


def best_widths(results: Results) -> dict[str, int]:
    """The width with the best validation, by data set.

    A data set has one if all smaller widths and the next larger one have been run, so that quality
    is known to fall on both sides.
    """
    found = {}
    for dataset in results.datasets:
        levels = by_width(results, dataset)
        if not levels:
            continue
        best = max(levels, key=lambda width: levels[width].value)
        tried = {width for width in WIDTHS if width <= 2 * best}
        if set(levels) >= tried and best < max(WIDTHS):
            found[dataset] = best
    return found


def rule(best: dict[str, int], events: dict[str, int]) -> tuple[float, float]:
    """The exponent e and the logarithm of c of `best width = c events^e`, by least squares."""
    x = np.log([events[dataset] for dataset in best])
    exponent, constant = np.polyfit(x, np.log(list(best.values())), 1)
    return float(exponent), float(constant)


def left_out(best: dict[str, int], events: dict[str, int]) -> dict[str, float]:
    """For each data set, the width that the rule of the others says."""
    found = {}
    for dataset in best:
        others = {name: width for name, width in best.items() if name != dataset}
        exponent, constant = rule(others, events)
        found[dataset] = math.exp(constant) * events[dataset] ** exponent
    return found


def verdict(results: Results) -> str:
    """Whether the best width grows with the number of events, and what state and heads do."""
    known = best_widths(results)
    if len(known) < 4:
        return ""
    exponent, _ = rule(known, events_of(results))
    grows = (
        f"No: the best width does not grow with the number of events (power {exponent:.2f})."
        if exponent <= 0
        else f"{'Yes' if exponent < 0.5 else 'No'}: the best width grows with the number of "
        f"events to the power {exponent:.2f}."
    )
    others = {
        f"{row['arm']} on {named(d)}": gap
        for d in results.datasets
        for row in results.select(dataset=d, width=_usual(d)["width"])
        if (gap := results.difference(d, row["arm"]))
    }
    if not others:
        return f"{grows} States and heads of other sizes have not been run."
    clear = [f"{name} ({gap})" for name, gap in others.items() if gap.clear]
    said = (
        f"these change NDCG@10 clearly: {join(clear)}" if clear else "none changes NDCG@10 clearly"
    )
    return f"{grows} Of {len(others)} trainings with other states or heads, {said}."


def answer(results: Results) -> list[str]:
    """The best widths, how clear they are, and the rule on data sets that it has not seen."""
    sentences, known = [], best_widths(results)
    for dataset in results.datasets:
        levels = by_width(results, dataset)
        if len(levels) > 1:
            best = max(levels, key=lambda width: levels[width].value)
            level = levels[best]
            least = level.value - level.error
            near = [str(w) for w, each in levels.items() if each.value >= least and w != best]
            verb = "is" if len(near) < 2 else "are"
            wider = "" if dataset in known else " Whether a wider one is better has not been tried."
            sentences.append(
                f"On {named(dataset)} width {best} is best on validation ({level}, where ± is the "
                f"standard error of the test); within that {verb} "
                f"{join(near) if near else 'no other'}.{wider}"
            )
    if len(known) >= 4:
        events = events_of(results)
        exponent, _ = rule(known, events)
        said = left_out(known, events)
        errors = [abs(math.log2(said[name] / known[name])) for name in known]
        sentences.append(
            f"Best widths go with events to the power {exponent:.2f}; on a data set that the rule "
            f"has not seen it is off by a factor of {2 ** float(np.mean(errors)):.1f} on the mean."
        )
    else:
        sentences.append(
            f"A rule needs the best widths of four data sets, and there are {len(known)}."
        )
    return sentences


def draw(results: Results, figure: Any) -> None:
    """Validation NDCG@10 by width relative to the best of the data set, and the rule."""
    curves = {d: levels for d in results.datasets if (levels := by_width(results, d))}
    if not curves:
        return
    left, right = panels(figure, ["quality by width", "best width by size of the data"])
    for number, (dataset, levels) in enumerate(curves.items()):
        most = max(level.value for level in levels.values())
        relative = [level.value / most for level in levels.values()]
        errors = [level.error / most for level in levels.values()]
        color = COLORS[number % len(COLORS)]
        left.errorbar(list(levels), relative, errors, fmt="o-", label=named(dataset), color=color)
    left.set_xscale("log", base=2)
    left.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    left.set(xlabel="width D", ylabel="validation NDCG@10, share of the best")
    left.legend(frameon=False, fontsize=8)
    best, counts = best_widths(results), events_of(results)
    events = [counts[dataset] for dataset in best]
    right.set(xlabel="events in training", ylabel="best width")
    if not best:
        right.text(0.5, 0.5, "not run yet", ha="center", transform=right.transAxes)
        return
    right.plot(events, list(best.values()), "o")
    if len(best) >= 2:
        exponent, constant = rule(best, counts)
        ends = np.array([min(events), max(events)])
        right.plot(ends, np.exp(constant) * ends**exponent, color=COLORS[1])
    right.set(xscale="log", yscale="log")
    right.set_yticks(WIDTHS, [str(width) for width in WIDTHS])
    right.tick_params(axis="y", which="minor", left=False, labelleft=False)


STUDY = Study(
    name="width",
    question="Which width, state and number of heads for which data?",
    hypothesis="The best width grows with the number of events, by less than its square root; the "
    "state and the number of heads matter little.",
    hours={"ml100k": 6, "ml1m": 60, "beauty": 15, "kuairand": 15, **{n: 0.3 for n in SYNTHETIC}},
    datasets=(*SYNTHETIC, "ml100k", "beauty", "kuairand", "ml1m"),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
    measure=measure,
    make={name: make_log for name in SYNTHETIC},
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
