"""Does time still help where SSD is at its best, in wide models?

    python -m studies.high_dimension

Each width is trained with time and without it, all else equal. Without time, the model is the block
of SSD4Rec*. The causal encoding is trained at every position, and the paper's encoding by prefixes.
A head is 32 wide whatever the model is, so wider models have more heads. The published code changes
its activation with the number of heads; here it stays the same, so that the width alone changes.
"""

import sys
from typing import Any

from studies.report import COLORS, Estimate, Results, join, named, panels, select
from studies.study import PREFIX, QUICK, QUICK_SSD, Arm, Study, main, overridden
from tim4rec_jax.errors import run_main

WIDTHS = (16, 32, 64, 128, 256)
# As many epochs as suffice under a cosine schedule; the config's own number elsewhere.
EPOCHS = {"ml100k": 12}


def arm(dataset: str, width: int, encoding: str, time: bool) -> Arm:
    """The training of a width, with time or without; other studies share it.

    Args:
      dataset: the name of a configuration.
      width: of the model.
      encoding: "causal" or "paper".
      time: whether the model uses it.
    """
    name = f"{encoding} {width}"
    settings = (f"model.hidden_size={width}", "model.conv_path=hardswish")
    if encoding == "paper":
        settings += PREFIX[dataset]
    elif dataset in EPOCHS:
        settings += (f"train.epochs={EPOCHS[dataset]}", f"train.patience={EPOCHS[dataset]}")
    return Arm(
        name if time else f"{name} without time",
        dataset,
        dataset if encoding == "paper" else f"{dataset}:causal",
        settings if time else (*settings, "model.is_time=False"),
        {"width": width, "encoding": encoding, "time": "yes" if time else "no"},
        against=f"{name} without time" if time else "",
    )


def quick_arm(time: bool) -> Arm:
    """A causal model that is trained in seconds, with time or without."""
    settings = overridden(QUICK_SSD, () if time else ("model.is_time=False",))
    against = "" if not time else "causal 8 without time"
    factors = {"width": 8, "encoding": "causal", "time": "yes" if time else "no"}
    name = "causal 8" + ("" if time else " without time")
    return Arm(name, QUICK, "quickstart:causal", settings, factors, against, data=QUICK)


def arms(dataset: str, quick: bool) -> list[Arm]:
    """Both encodings at all widths, with time and without."""
    if quick:
        return [quick_arm(False), quick_arm(True)]
    return [
        arm(dataset, width, encoding, time)
        for encoding in ("causal", "paper")
        for width in WIDTHS
        for time in (False, True)
    ]


def gains(results: Results, dataset: str, encoding: str) -> dict[int, Estimate]:
    """What time adds to NDCG@10, by width."""
    found = {}
    for row in select(results.runs, dataset=dataset, encoding=encoding, time="yes"):
        if gap := results.difference(dataset, row["arm"]):
            found[row["width"]] = gap
    return dict(sorted(found.items()))


def trend(by_width: dict[int, Estimate]) -> Estimate | None:
    """How the gain changes when the width doubles: weighted least squares on log2(width).

    The error is that of the slope, from the errors of the gains; None: there are too few widths.
    """
    if len(by_width) < 2:
        return None
    steps = range(1, 20)
    x = {width: next(k for k in steps if 2**k >= width) for width in by_width}
    weights = {width: 1 / max(gap.error, 1e-9) ** 2 for width, gap in by_width.items()}
    total = sum(weights.values())
    middle = sum(weights[w] * x[w] for w in by_width) / total
    spread = sum(weights[w] * (x[w] - middle) ** 2 for w in by_width)
    slope = sum(weights[w] * (x[w] - middle) * by_width[w].value for w in by_width) / spread
    return Estimate(slope, spread**-0.5, min(gap.seeds for gap in by_width.values()))


def verdict(results: Results) -> str:
    """Whether the gain of the causal encoding falls with the width."""
    found = {dataset: gains(results, dataset, "causal") for dataset in results.datasets}
    every = [(d, width, gap) for d, by_width in found.items() for width, gap in by_width.items()]
    if not every:
        return ""
    clear = [f"{named(d)} at {w}" for d, w, gap in every if gap.clear and gap.value > 0]
    if not clear:
        return (
            "The hypothesis cannot be tested: time has no clear gain at any of the widths that "
            f"were tried ({len(every)} pairs of models), so there is none that could fall."
        )
    falls = [
        named(d) for d, gaps in found.items() if (s := trend(gaps)) and s.clear and s.value < 0
    ]
    if falls:
        return f"Yes on {join(falls)}: there the gain of time falls with the width."
    return (
        f"No: time has a clear gain in {len(clear)} of {len(every)} pairs of models "
        f"({join(clear)}), and the gain falls clearly with the width on no data set."
    )


def answer(results: Results) -> list[str]:
    """The gain by width, its trend, and the widest model."""
    sentences = []
    for dataset in results.datasets:
        for encoding in ("causal", "paper"):
            found = gains(results, dataset, encoding)
            if not found:
                continue
            told = join([f"{gap} at {width}" for width, gap in found.items()])
            text = f"On {named(dataset)} time ({encoding}) changes NDCG@10 by {told}"
            if slope := trend(found):
                way = "rises" if slope.value > 0 else "falls"
                clear = f"{way} by {slope} with each doubling of the width"
                text += (
                    f"; the gain {clear}"
                    if slope.clear
                    else (
                        f"; a change with the width cannot be told from none ({slope} a doubling)"
                    )
                )
            plain = [
                (row["width"], results.level("valid_ndcg@10", dataset=dataset, arm=row["arm"]))
                for row in select(results.runs, dataset=dataset, encoding=encoding, time="no")
            ]
            if len({width for width, _ in plain}) > 1:
                best = max(plain, key=lambda pair: pair[1].value if pair[1] else 0)
                text += f". Without time the best width on validation is {best[0]}"
            sentences.append(f"{text}.")
    return sentences or ["No width has been run both with time and without."]


def draw(results: Results, figure: Any) -> None:
    """NDCG@10 by width with time and without, a panel for each data set and encoding."""
    shown = {
        (row["dataset"], row["encoding"]): None for row in results.runs if row["dataset"] != QUICK
    } or {(row["dataset"], row["encoding"]): None for row in results.runs}
    titles = [f"{named(dataset)}, {encoding}" for dataset, encoding in shown]
    if not titles:
        return
    for panel, (dataset, encoding) in zip(panels(figure, titles), shown, strict=True):
        for time, color, label in (("yes", COLORS[0], "with time"), ("no", COLORS[1], "without")):
            rows = select(results.runs, dataset=dataset, encoding=encoding, time=time)
            arms = {row["width"]: row["arm"] for row in rows}
            levels = {w: results.level(dataset=dataset, arm=arms[w]) for w in sorted(arms)}
            values = [level.value for level in levels.values() if level]
            errors = [level.error for level in levels.values() if level]
            # Side by side, so that neither bar hides the other.
            places = [width * (0.97 if time == "yes" else 1.03) for width in levels]
            panel.errorbar(places, values, errors, fmt="o-", color=color, capsize=3, label=label)
        panel.set_xscale("log", base=2)
        widths = sorted({row["width"] for row in select(results.runs, dataset=dataset)})
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.set_xlim(widths[0] / 1.3, widths[-1] * 1.3)  # wide enough where there is one width
        panel.minorticks_off()
        panel.set(xlabel="width D", ylabel="test NDCG@10 ± standard error")
        panel.legend(frameon=False)


STUDY = Study(
    name="high_dimension",
    question="Does time still help in wide models, where SSD is at its best?",
    hypothesis="Less: a wide state can keep what a narrow one must leave out, so the gain of time "
    "falls with the width and is gone at 256.",
    hours={"ml100k": 9, "beauty": 16, "kuairand": 9},
    datasets=("ml100k", "beauty", "kuairand"),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
