"""Does time raise the effective rank of the mask where the dimension is low?

    python -m studies.spectra

The mask of an SSD layer says how much each event counts in each later one, before the content of
the events is looked at. It is a matrix [L, L] for each history, layer and head. This study takes
its singular values on real histories: those of the model as it was trained, and those of the same
weights with the time taken out. The effective rank is the exponential of the entropy of the
singular values, as shares of their sum (Roy and Vetterli, 2007). It is L if all are equal, and 1 if
there is one only.

The page of the study says what can be proved. The trainings are those of `studies.high_dimension`
in its causal encoding, by width, and shorter ones of 1 and 3 epochs at one width. Each is looked at
with its initial weights too.
"""

import dataclasses
import math
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from studies import high_dimension
from studies.report import COLORS, Estimate, Results, Row, join, named, panels, select
from studies.study import Arm, Study, Training, main, overridden
from tim4rec_jax.data import EvalBatches, open_dataset
from tim4rec_jax.errors import run_main
from tim4rec_jax.models import SequenceModel, build
from tim4rec_jax.run import load_model, read_date_range

HISTORIES = 64
WIDTHS = (16, 32, 64, 128)
MIDDLE, SHORTER = 32, (1, 3)  # the width that is trained for fewer epochs too, and for how many
PLACES = (1, 2, 4, 8, 16, 32)  # of the singular values that are kept


def spectrum(masks: Float[np.ndarray, "*batch L L"]) -> Float[np.ndarray, "*batch L"]:
    """The singular values as shares of their sum, the largest first."""
    values = np.linalg.svd(masks.astype(np.float64), compute_uv=False)
    return values / values.sum(-1, keepdims=True)


def effective_rank(masks: Float[np.ndarray, "*batch L L"]) -> Float[np.ndarray, "*batch"]:
    """The exponential of the entropy of the `spectrum`, between 1 and L."""
    shares = spectrum(masks)
    return np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum(-1))


def without_time(model: SequenceModel, settings: Any, sizes: dict[str, Any]) -> SequenceModel:
    """A model of the same weights, without those that belong to time.

    Args:
      model: TiM4Rec in any encoding.
      settings: those of the model, `config.model`.
      sizes: the arguments of `build` that say how large it is.
    """
    plain = build({**settings, "is_time": False}, **sizes)
    weights = nnx.to_flat_state(nnx.state(model))
    known = dict(weights)
    state = nnx.to_flat_state(nnx.state(plain))
    nnx.update(plain, nnx.from_flat_state([(path, known[path]) for path, _ in state]))
    return plain


def _trained_for(epochs: int) -> str:
    """The name of the arm of the middle width that is trained for this many epochs."""
    return f"causal {MIDDLE}, {epochs} epoch{'s' * (epochs > 1)}"


def arms(dataset: str, quick: bool) -> list[Arm]:
    """The causal model by width, and for fewer epochs; the models without time are not needed."""
    if quick:
        return [dataclasses.replace(high_dimension.quick_arm(True), against="")]
    wide = [
        dataclasses.replace(high_dimension.arm(dataset, width, "causal", True), against="")
        for width in WIDTHS
    ]
    [middle] = [arm for arm in wide if arm.factors["width"] == MIDDLE]
    short = [
        Arm(
            _trained_for(epochs),
            dataset,
            middle.config,
            overridden(middle.settings, (f"train.epochs={epochs}", "train.schedule=constant")),
            middle.factors,
        )
        for epochs in SHORTER
    ]
    return wide + short


@nnx.jit
def _masks(model: Any, items: Any, lengths: Any, gaps: Any) -> list[jax.Array]:
    return model.masks(items, lengths, gaps)


def measure(found: list[Training]) -> Iterator[Row]:
    """The spectra of a training at its beginning and at its best epoch, by layer and head."""
    for training in found:
        config, best = load_model(training.folder / "run")
        log = open_dataset(config.dataset)
        batches = EvalBatches(
            log,
            "test",
            max_length=config.data.max_length,
            batch_size=min(HISTORIES, log.n_users),
            convention=config.data.convention,
            buckets=(config.data.max_length,),
        )
        # The longest histories come last; the last batch may be filled up with copies.
        batch = batches[max(len(batches) - 2, 0)]
        full = batch["lengths"] == config.data.max_length
        full = full if full.any() else batch["lengths"] == batch["lengths"].max()
        length = int(batch["lengths"][full][0])
        inputs = [batch["items"][full], batch["lengths"][full], batch["gaps"][full]]
        sizes: dict[str, Any] = dict(
            n_items=log.n_items,
            max_length=config.data.max_length,
            date_range=read_date_range(training.folder / "run"),
        )
        first = build(config.model, seed=config.seed, **sizes)
        for epoch, model in (("initial", first), ("best", best)):
            plain = without_time(model, config.model, sizes)
            pairs = zip(_masks(model, *inputs), _masks(plain, *inputs), strict=True)
            for layer, masks in enumerate(pairs, 1):
                timed, untimed = (np.asarray(m)[..., :length, :length] for m in masks)  # [B,H,L,L]
                for head in range(timed.shape[1]):
                    at = f"{epoch}, layer {layer}, head {head + 1}"
                    where = {"epoch": epoch, "layer": layer, "head": head + 1, "length": length}
                    yield _row(training, at, where, timed[:, head], untimed[:, head])


def _row(training: Training, at: str, where: Row, timed: np.ndarray, plain: np.ndarray) -> Row:
    ranks = effective_rank(timed), effective_rank(plain)
    gap, root = ranks[0] - ranks[1], math.sqrt(len(timed))
    shares = spectrum(timed).mean(0), spectrum(plain).mean(0)
    arm = training.arm
    return {
        **{"dataset": arm.dataset, "arm": arm.name, "seed": training.seed},
        **{"what": "spectrum", "at": at, "width": arm.factors["width"]},
        "epochs": training.figures["best_epoch"] if where["epoch"] == "best" else 0,
        **where,
        "histories": len(timed),
        "effective_rank": float(ranks[0].mean()),
        "effective_rank_plain": float(ranks[1].mean()),
        "difference": float(gap.mean()),
        "se": float(gap.std(ddof=1)) / root if len(gap) > 1 else 0.0,
        **{f"s{k}": float(shares[0][k - 1]) for k in PLACES if k <= timed.shape[-1]},
        **{f"plain_s{k}": float(shares[1][k - 1]) for k in PLACES if k <= timed.shape[-1]},
    }


def rise(rows: list[Row]) -> Estimate:
    """The mean rise of the effective rank over layers, heads and seeds; the error is over seeds.

    With one seed the error is over heads.
    """
    by_seed: dict[Any, list[float]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row["difference"])
    means = [statistics.mean(values) for values in by_seed.values()]
    sample = means if len(means) > 1 else [row["difference"] for row in rows]
    error = statistics.stdev(sample) / math.sqrt(len(sample)) if len(sample) > 1 else 0.0
    return Estimate(statistics.mean(means), error, len(means))


def _by_width(results: Results, dataset: str) -> dict[int, list[Row]]:
    rows = select(results.details, dataset=dataset, what="spectrum", epoch="best")
    rows = [row for row in rows if "epoch" not in row["arm"]]  # those of fewer epochs apart
    return {w: select(rows, width=w) for w in sorted({row["width"] for row in rows})}


def _by_epoch(results: Results, dataset: str) -> dict[str, list[Row]]:
    """The rows of the middle width before training, after few epochs, and at the best epoch.

    Nothing, if no short training has been looked at.
    """
    rows = select(results.details, dataset=dataset, what="spectrum", width=MIDDLE)
    whole = f"causal {MIDDLE}"
    short = {
        str(epochs): found
        for epochs in SHORTER
        if (found := select(rows, arm=_trained_for(epochs), epoch="best"))
    }
    before, after = (select(rows, arm=whole, epoch=epoch) for epoch in ("initial", "best"))
    return {"none": before, **short, "best": after} if before and short else {}


def _spoken(value: float) -> str:
    return f"{value:.2f}"


def verdict(results: Results) -> str:
    """Whether time raises the effective rank in narrow models."""
    found = {
        f"{named(d)} at width {w}": rise(rows)
        for d in results.datasets
        for w, rows in _by_width(results, d).items()
    }
    if not found:
        return ""
    up = [name for name, gap in found.items() if gap.clear and gap.value > 0]
    down = [name for name, gap in found.items() if gap.clear and gap.value < 0]
    if not up + down:
        return "Time changes the effective rank clearly nowhere."
    parts = [
        f"time {way} the effective rank clearly on {join(names)}"
        for way, names in (("raises", up), ("lowers", down))
        if names
    ]
    rest = len(found) - len(up) - len(down)
    text = f"{'In part' if up and down else 'Yes' if up else 'No'}: {' and '.join(parts)}"
    return text + (
        f". No clear change is seen elsewhere ({rest} of {len(found)})." if rest else "."
    )


def answer(results: Results) -> list[str]:
    """The rise by width, the trend, and what training does to the mask."""
    sentences = []
    for dataset in results.datasets:
        by_width = _by_width(results, dataset)
        if not by_width:
            continue
        rises = {width: rise(rows) for width, rows in by_width.items()}
        length = next(iter(by_width.values()))[0]["length"]
        told = join(
            [f"{_spoken(g.value)} ± {_spoken(g.error)} at width {w}" for w, g in rises.items()]
        )
        levels = [
            statistics.mean(row["effective_rank_plain"] for row in rows)
            for rows in by_width.values()
        ]
        text = (
            f"On {named(dataset)}, in histories of {length} events, time changes the effective "
            f"rank of the mask by {told}, from {join([_spoken(level) for level in levels])}"
        )
        if slope := high_dimension.trend(rises):
            way = "rises" if slope.value > 0 else "falls"
            number = f"{_spoken(slope.value)} ± {_spoken(slope.error)} a doubling"
            text += (
                f"; this change {way} with the width ({number})"
                if slope.clear
                else (f"; no trend with the width can be told ({number})")
            )
        alone = [str(width) for width, gap in rises.items() if gap.seeds == 1]
        if alone:
            text += f"; with one seed, the error is over heads ({join(alone)})"
        sentences.append(f"{text}.")
        heads = [row["difference"] for rows in by_width.values() for row in rows]
        up = sum(value > 0 for value in heads)
        first = select(results.details, dataset=dataset, what="spectrum", epoch="initial")
        first = [row for row in first if "epoch" not in row["arm"]]
        start = statistics.mean(row["effective_rank"] for row in first)
        end = statistics.mean(r["effective_rank"] for rows in by_width.values() for r in rows)
        sentences.append(
            f"There it raises it in {up} of {len(heads)} heads, and training itself moves the "
            f"effective rank from {_spoken(start)} to {_spoken(end)}."
        )
        if stages := _by_epoch(results, dataset):
            told = [
                f"{_spoken(statistics.mean(row['effective_rank'] for row in rows))} "
                f"({_spoken(rise(rows).value)} ± {_spoken(rise(rows).error)})"
                + {"none": " before training", "best": " at the best epoch"}.get(
                    epochs, f" after {epochs} epoch{'s' * (epochs != '1')}"
                )
                for epochs, rows in stages.items()
            ]
            sentences.append(
                f"By epoch, at width {MIDDLE}, it is {join(told)}; in brackets what of it is "
                "the effect of time."
            )
    return sentences or ["No training has been looked at yet."]


def draw(results: Results, figure: Any) -> None:
    """The effective rank by width and head, and the singular values."""
    datasets = [d for d in results.datasets if _by_width(results, d)]
    if not datasets:
        return
    kinds = ("effective rank", "singular values")
    epochs = {d: stages for d in datasets if (stages := _by_epoch(results, d))}
    titles = [f"{named(d)}: {kind}" for d in datasets for kind in kinds]
    titles += [f"width {MIDDLE} in training"] * bool(epochs)
    drawn = iter(panels(figure, titles))
    for dataset, ranks, values in zip(datasets, drawn, drawn, strict=False):
        by_width = _by_width(results, dataset)
        for number, rows in enumerate(by_width.values()):
            for column, color, label in (
                ("effective_rank", COLORS[0], "with time"),
                ("effective_rank_plain", COLORS[1], "the same weights without"),
            ):
                shift = -0.12 if column == "effective_rank" else 0.12
                ranks.plot(
                    [number + shift] * len(rows),
                    [row[column] for row in rows],
                    "_",
                    color=color,
                    markersize=11,
                    label=label if number == 0 else None,
                )
        ranks.set_xticks(range(len(by_width)), [str(width) for width in by_width])
        ranks.set_xlim(-0.5, len(by_width) - 0.5)
        ranks.set(xlabel="width D; a stroke is a head of a layer", ylabel="effective rank")
        if dataset == datasets[0]:
            ranks.legend(frameon=False, loc="lower left", fontsize=8)
        for prefix, style in (("", "o-"), ("plain_", "s--")):
            for number, (width, rows) in enumerate(by_width.items()):
                places = [k for k in PLACES if rows[0].get(f"s{k}") not in (None, "")]
                means = [statistics.mean(row[f"{prefix}s{k}"] for row in rows) for k in places]
                label = f"D {width}" + (" without time" if prefix else "")
                color = COLORS[number % len(COLORS)]
                values.plot(places, means, style, color=color, markersize=3, label=label)
        values.set(xscale="log", yscale="log", xlabel="number", ylabel="share of their sum")
        values.legend(frameon=False, fontsize=8)
    if not epochs:
        return
    training = next(drawn)
    for color, (dataset, stages) in zip(COLORS, epochs.items(), strict=False):
        for column, style in (("effective_rank", "o-"), ("effective_rank_plain", "s--")):
            means = [statistics.mean(row[column] for row in rows) for rows in stages.values()]
            label = named(dataset) + (" without time" if style == "s--" else "")
            training.plot(list(stages), means, style, color=color, markersize=4, label=label)
    training.set(xlabel="epochs of training", ylabel="effective rank")
    training.legend(frameon=False, fontsize=8)


STUDY = Study(
    name="spectra",
    question="Does time raise the effective rank of the mask where the dimension is low?",
    hypothesis="Yes: a narrow model has few heads with which to tell events apart, and time lets "
    "one head have short and long steps, so its mask is further from one of rank 1.",
    hours={"ml100k": 2, "beauty": 7, "kuairand": 7},
    datasets=("ml100k", "beauty", "kuairand"),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
