"""Are transformers that know the time as good as TiM4Rec, at equal parameters and equal cost?

    python -m studies.time_aware_transformers

SASRec ignores the time. TiSASRec adds vectors for the seconds between two events to keys and
values, and HSTU adds a learned number for them to the attention. TiM4Rec takes part with the
encodings `paper`, `masked` and `causal`, and without time. All have the same width, so that the
item tables, which hold most parameters, are equal; the results say how many parameters each has
besides. No model has a repeat bias, so that only the architectures differ.

Models that look at no later event are trained at every position, the others by prefixes. The
figures of the best epoch say what a model reaches. The curves say what it costs: the best
validation so far against the processor time so far, at which models can be compared at equal cost.
"""

import statistics
import sys
from collections.abc import Iterator
from typing import Any

from matplotlib.ticker import LogLocator

from studies.report import COLORS, Results, Row, join, named, panels, select, short
from studies.study import (
    PREFIX,
    QUICK,
    QUICK_SETTINGS,
    QUICK_SSD,
    Arm,
    Study,
    Training,
    main,
    overridden,
)
from tim4rec_jax.errors import run_main
from tim4rec_jax.run import read_validations

REFERENCE = "TiM4Rec causal"
PACKED = {
    "ml100k": ("train.batch_size=32", "train.epochs=30"),
    "beauty": ("train.batch_size=32", "train.epochs=25"),
    "kuairand": ("train.batch_size=64", "train.epochs=25"),
}
# The variant of the configuration, whether the model knows the time, whether it trains at every
# position, and settings of its own. The settings of SSD layers stand for "SSD".
MODELS: dict[str, tuple[str, bool, bool, tuple[str, ...]]] = {
    REFERENCE: ("causal", True, True, ("SSD",)),
    "TiM4Rec without time": ("causal", False, True, ("SSD", "model.is_time=False")),
    "SASRec": ("sasrec", False, True, ()),
    "TiSASRec": ("tisasrec", True, True, ("data.convention=exact",)),
    "HSTU": ("hstu", True, True, ()),
    "TiM4Rec paper": ("", True, False, ("SSD",)),
    "TiM4Rec masked": ("", True, False, ("SSD", "model.time_encoding=masked")),
}


def arms(dataset: str, quick: bool) -> list[Arm]:
    """All models; with `quick` two of them."""
    found = []
    for name, (variant, time, packed, own) in MODELS.items():
        if quick and name not in (REFERENCE, "TiSASRec"):
            continue
        config = "quickstart" if quick else dataset
        settings = ("model.repeat_bias=False", "model.date_bias_knots=0")
        settings += tuple(setting for setting in own if setting != "SSD")
        if packed:
            settings += ("train.objective=every_position", "train.schedule=cosine")
            if not quick:
                [epochs] = (s for s in PACKED[dataset] if "epochs" in s)
                settings += (*PACKED[dataset], epochs.replace("epochs", "patience"))
        elif not quick:
            settings += PREFIX[dataset]
        if quick:
            settings = overridden(settings, QUICK_SSD if "SSD" in own else QUICK_SETTINGS)
            settings += () if "SSD" in own else ("model.hidden_size=8", "model.n_layers=1")
        found.append(
            Arm(
                name,
                dataset,
                f"{config}:{variant}".removesuffix(":"),
                settings,
                {"time": "yes" if time else "no", "packed": "yes" if packed else "no"},
                against="" if name == REFERENCE else REFERENCE,
                data=QUICK if quick else "",
            )
        )
    return found


def measure(found: list[Training]) -> Iterator[Row]:
    """The best validation so far by processor time, for each epoch.

    The epochs of a training cost about the same, so each has an equal share of its processor time.
    """
    for training in found:
        best = 0.0
        for record in read_validations(training.folder / "run"):
            best = max(best, record["ndcg@10"])
            share = record["epoch"] / training.figures["epochs"]
            yield {
                **{"dataset": training.arm.dataset, "arm": training.arm.name},
                **{"seed": training.seed, "what": "validation", "at": f"epoch {record['epoch']}"},
                **{"cpu_s": share * training.figures["cpu"], "best_ndcg@10": best},
            }


def at_cost(results: Results, dataset: str, arm: str, budget: float) -> float | None:
    """The mean over seeds of the best validation NDCG@10 within a processor time.

    It is None where a seed has not ended its first epoch by then.
    """
    rows = select(results.details, dataset=dataset, arm=arm, what="validation")
    by_seed: dict[int, list[float]] = {row["seed"]: [] for row in rows}
    for row in rows:
        if row["cpu_s"] <= budget:
            by_seed[row["seed"]].append(row["best_ndcg@10"])
    if not by_seed or not all(by_seed.values()):
        return None
    return statistics.mean(max(found) for found in by_seed.values())


def verdict(results: Results) -> str:
    """Whether transformers that know the time are as good at equal size."""
    lower, higher, level = [], [], []
    for dataset in results.datasets:
        for name in ("TiSASRec", "HSTU"):
            if gap := results.difference(dataset, name):
                where = level if not gap.clear else higher if gap.value > 0 else lower
                where.append(f"{name} on {named(dataset)}")
    if not lower + higher + level:
        return ""
    holds = "Yes, at equal size" if not lower + higher else "Not everywhere, at equal size"
    parts = [
        *([f"{join(level)} cannot be told from {REFERENCE}"] if level else []),
        *([f"{join(lower)} {'is' if len(lower) == 1 else 'are'} clearly lower"] if lower else []),
        *(
            [f"{join(higher)} {'is' if len(higher) == 1 else 'are'} clearly higher"]
            if higher
            else []
        ),
    ]
    return f"{holds}: {', and '.join(parts)}."


def answer(results: Results) -> list[str]:
    """The models against the reference, then all at the cost of the cheapest."""
    sentences = []
    for dataset in results.datasets:
        told = {
            name: gap
            for name in results.arms(dataset)
            if (gap := results.difference(dataset, name))
        }
        if told:
            words = join([f"{name} is {gap.compared()}" for name, gap in told.items()])
            sentences.append(
                f"On {named(dataset)}, test NDCG@10 against {REFERENCE}: "
                f"{words.replace('is no clear', 'shows no clear')}."
            )
        costs = {
            name: cost.value
            for name in results.arms(dataset)
            if (cost := results.level("train_cpu_s", dataset=dataset, arm=name))
        }
        budget = min(costs.values())
        reached = {name: at_cost(results, dataset, name, budget) for name in costs}
        known = {name: value for name, value in reached.items() if value is not None}
        ordered = sorted(known.items(), key=lambda pair: -pair[1])
        at = join([f"{name} {short(value)}" for name, value in ordered])
        if late := [name for name in reached if name not in known]:
            at += f"; {join(late)} {'has' if len(late) == 1 else 'have'} not ended an epoch by then"
        sentences.append(
            f"Within the {budget:,.0f} processor seconds of the cheapest training "
            f"there ({min(costs, key=lambda name: costs[name])}), validation NDCG@10 reaches: {at}."
        )
        sizes = {name: results.select(dataset=dataset, arm=name)[0]["parameters"] for name in costs}
        least, most = min(sizes.values()), max(sizes.values())
        sentences.append(f"The models there have from {least:,} to {most:,} parameters.")
    return sentences


def draw(results: Results, figure: Any) -> None:
    """Validation by processor time, a line for each seed of each model."""
    datasets = [d for d in results.datasets if select(results.details, dataset=d)]
    if not datasets:
        return
    for panel, dataset in zip(panels(figure, list(map(named, datasets))), datasets, strict=True):
        for number, arm in enumerate(results.arms(dataset)):
            rows = select(results.details, dataset=dataset, arm=arm, what="validation")
            for seed in dict.fromkeys(row["seed"] for row in rows):
                mine = select(rows, seed=seed)
                panel.plot(
                    [row["cpu_s"] for row in mine],
                    [row["best_ndcg@10"] for row in mine],
                    color=COLORS[number % len(COLORS)],
                    label=arm if seed == mine[0]["seed"] == rows[0]["seed"] else None,
                )
        panel.set(xscale="log", xlabel="processor seconds so far", ylabel="best validation NDCG@10")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize=8)


STUDY = Study(
    name="time_aware_transformers",
    question="Are transformers that know the time as good as TiM4Rec, at equal size and cost?",
    hypothesis="At equal size yes: what counts is that a model sees the gaps, not what it "
    "mixes with. At equal cost the models that train at every position win.",
    hours={"ml100k": 2, "beauty": 5, "kuairand": 3},
    datasets=("ml100k", "beauty", "kuairand"),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
