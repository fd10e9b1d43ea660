"""Is it the normalisation of time or the idea of time that gives the gain?

    python -m studies.normalisation

The paper's time stream begins with a LayerNorm over the padded row of gaps. This study puts other
normalisations into its place, and leaves everything else as it is.

    none     the model without time
    paper    LayerNorm over the padded row, whose first padding holds minus the last time
    masked   LayerNorm over the gaps of real events
    days     no normalisation: the gaps in days
    log      log(1 + gap), divided by that of ten years
    user     the gap divided by the mean gap of the same history
    rank     the share of the history's gaps that are not longer

The scale and shift that a LayerNorm learns for each position follow all of them.

Besides real logs there are two synthetic ones, whose best possible figures are known. They have the
same events. In `since-visit` the times of a user are seconds since the first visit, and in
`since-1970` since 1970, as in a real log. Only the padding of `paper` can tell them apart, and
the float32 in which it reads times.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt32

from studies.report import COLORS, Estimate, Results, dots, join, named, panels, together
from studies.study import PREFIX, QUICK, QUICK_SSD, Arm, Study, main, overridden
from tim4rec_jax.data_prep import synthetic
from tim4rec_jax.data_prep.__main__ import main as data_prep
from tim4rec_jax.errors import run_main
from tim4rec_jax.layers import dropout
from tim4rec_jax.models.base import DataSizes, one_of
from tim4rec_jax.models.tim4rec import TiM4Rec, TiM4RecSettings

_DAY, _TEN_YEARS = 86_400.0, 10 * 365.25 * 86_400.0  # seconds
# The first second of all users.
SYNTHETIC = {"since-visit": 0, "since-1970": 1_300_000_000}
# Of the synthetic logs. With 1,000 users four epochs are too few to find out what the time says.
USERS, ITEMS = 4000, 120


def _days(gaps: jax.Array, real: jax.Array) -> jax.Array:
    del real
    return gaps / _DAY


def _log(gaps: jax.Array, real: jax.Array) -> jax.Array:
    del real
    # Times rounded to float32 order the events, so an exact gap can be some seconds below zero.
    return jnp.log1p(jnp.maximum(gaps, 0.0)) / jnp.log1p(_TEN_YEARS)


def _user(gaps: jax.Array, real: jax.Array) -> jax.Array:
    mean = gaps.sum(-1, keepdims=True, where=real) / real.sum(-1, keepdims=True)
    return gaps / jnp.maximum(mean, 1.0)


def _rank(gaps: jax.Array, real: jax.Array) -> jax.Array:
    not_longer = (gaps[..., None, :] <= gaps[..., :, None]) & real[..., None, :]
    return not_longer.sum(-1) / real.sum(-1, keepdims=True)


NORMALISATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "days": _days,
    "log": _log,
    "user": _user,
    "rank": _rank,
}


class NormalisedGaps(nnx.Module):
    """Takes the place of `tim4rec_jax.layers.TimeEncoder`, with another normalisation.

    Attributes:
      scale: one for each position [T], as in LayerNorm.
      bias: likewise.
    """

    def __init__(self, length: int, how: str, dropout_rate: float, dtype: Any):
        self.scale = nnx.Param(jnp.ones((length,), dtype))
        self.bias = nnx.Param(jnp.zeros((length,), dtype))
        self.how, self.dropout_rate, self.dtype = how, dropout_rate, dtype

    def __call__(
        self,
        gaps: Float[Array, "B T"],
        real: Bool[Array, "B 1 T"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B 1 T"]:
        """See `TimeEncoder`."""
        tau = NORMALISATIONS[self.how](gaps[:, None].astype(self.dtype), real)
        tau = dropout(tau, self.dropout_rate, seeds)
        return jnp.where(real, tau * self.scale[...] + self.bias[...], 0.0)


@dataclasses.dataclass(frozen=True)
class NormalisedSettings(TiM4RecSettings):
    """Those of TiM4Rec, and one more.

    Attributes:
      time_encoding: "masked", the only one.
      normalisation: of the gaps, see the module.
    """

    time_encoding: str = one_of("masked")
    normalisation: str = one_of("log", "days", "user", "rank")


class NormalisedTiM4Rec(TiM4Rec):
    """The paper's model with exact gaps and another normalisation of them."""

    Settings = NormalisedSettings

    def __init__(
        self,
        settings: NormalisedSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(settings, sizes, rngs=rngs, param_dtype=param_dtype)
        how, rate = settings.normalisation, settings.dropout_prob
        self.time = NormalisedGaps(sizes.max_length, how, rate, param_dtype)


# Half as wide as the paper's model: with all arms and seeds, time is what is short.
MODEL = (
    *("model.hidden_size=32", "model.head_dim=16", "model.num_layers=2", "model.d_state=16"),
    *("model.dropout_prob=0.2", "model.time_drop_out=0.0", "model.norm_eps=1e-12"),
    "model.is_kai_ming_init=True",
)
MADE = (
    *("train.batch_size=64", "train.epochs=4", "train.patience=4", "train.learning_rate=0.003"),
    *("data.max_length=32", "data.buckets=(32,)", "train.objective=prefix"),
)
ENCODINGS = {
    "none": ("model.is_time=False",),
    "paper": ("model.time_encoding=paper",),
    "masked": ("model.time_encoding=masked",),
    **{
        how: (
            f"model.name={__package__}.normalisation:NormalisedTiM4Rec",
            f"model.normalisation={how}",
        )
        for how in NORMALISATIONS
    },
}


def arms(dataset: str, quick: bool) -> list[Arm]:
    """All normalisations; with `quick` three of them."""
    made = dataset in (*SYNTHETIC, QUICK)
    config, data = ("quickstart", dataset) if made else (dataset, "")
    common = (*MODEL, *(MADE if made else PREFIX[dataset]))
    if quick:
        common = overridden(common, QUICK_SSD)
    return [
        Arm(
            name,
            dataset,
            config,
            (*common, *settings),
            {"normalisation": name},
            against="" if name == "none" else "none",
            data=data,
        )
        for name, settings in ENCODINGS.items()
        if not quick or name in ("none", "paper", "rank")
    ]


def make_synthetic(folder: Path, quick: bool) -> None:
    """Prepares one of the two synthetic logs, with the best possible figures in dataset.json."""
    del quick
    items, times, lengths = synthetic.generate(USERS, ITEMS, seed=0)
    keep = np.arange(items.shape[1]) < lengths[:, None]
    columns = {
        "user_id": np.broadcast_to(np.arange(USERS)[:, None], items.shape)[keep],
        "item_id": items[keep],
        "timestamp": times[keep] + SYNTHETIC[folder.name],
    }
    source = folder.with_name(f"{folder.name}.parquet")
    pq.write_table(pa.table(columns), source)
    data_prep(["table", str(source), "--k-core", "1", "--out", str(folder)])


def ceilings() -> dict[str, float]:
    """The best NDCG@10 of a test on the synthetic logs, with time and without."""
    found = synthetic.oracle(*synthetic.generate(USERS, ITEMS, seed=0), ITEMS)["test"]
    return {name: found[name]["ndcg@10"] for name in ("with_time", "time_blind")}


def _gains(results: Results, dataset: str) -> dict[str, Estimate]:
    """The differences from the model without time on a data set, by normalisation."""
    gaps = {name: results.difference(dataset, name) for name in ENCODINGS}
    return {name: gap for name, gap in gaps.items() if gap}


def _told(gains: dict[str, Estimate]) -> str:
    """The differences, the largest first, and for which of them a gain is clear."""
    ordered = sorted(gains.items(), key=lambda pair: -pair[1].value)
    clear = [name for name, gap in ordered if gap.clear and gap.value > 0]
    verdict = f"clear for {join(clear)}" if clear else "clear for none of them"
    alone = [name for name in clear if gains[name].seeds == 1]
    if alone:
        who = "each of these" if alone == clear else join(alone)
        verdict += f"; {who} ran with one seed, whose chance the error leaves out"
    return f"{join([f'{name} {gap}' for name, gap in ordered])}: a gain is {verdict}."


def _share(gap: Estimate, room: float) -> str:
    """A gain as a share of the best possible one."""
    return f"{round(100 * gap.value / room)} ± {round(100 * gap.error / room)} %"


def verdict(results: Results) -> str:
    """Whether every normalisation that keeps the gaps apart gains the same."""
    best = ceilings()
    room = best["with_time"] - best["time_blind"]
    found = {name: _gains(results, name) for name in SYNTHETIC}
    if not all(found.values()):
        return ""
    apart = {n: gap for n, gap in found["since-visit"].items() if n != "paper"}
    shares = {name: _share(gap, room) for name, gap in apart.items()}
    nothing = [name for name, gap in apart.items() if not gap.clear]
    if len(nothing) == len(apart):
        told = join([f"{n} {_share(gap, room)}" for n, gap in found["since-visit"].items()])
        return (
            "It cannot be told: of what the synthetic log with times since the first visit offers, "
            f"no normalisation in the paper's place gains a clear share ({told})."
        )
    same = "Yes" if not nothing else "No, the normalisation decides"
    some = [f"{name} {share}" for name, share in shares.items() if name not in nothing]
    text = f"{same}: of what the synthetic logs offer, {join(some)} is gained"
    if nothing:
        text += (
            f", and nothing clear with {join(nothing)}, which keep long and short gaps apart, too"
        )
    paper = [found[name].get("paper") for name in SYNTHETIC]
    if paper[0] and paper[1] and paper[0].clear and not paper[1].clear:
        text += (
            ". The paper's gains much where times begin with the first visit, and nothing where "
            "they are counted from 1970, as expected"
        )
    return f"{text}."


def answer(results: Results) -> list[str]:
    """What time gives under each normalisation, where it matters, and what that means."""
    gains = {name: _gains(results, name) for name in results.datasets}
    real = [name for name, found in gains.items() if found and name not in SYNTHETIC]
    sentences = [
        f"On {named(dataset)} the NDCG@10 changes against the model without time by "
        f"{_told(gains[dataset])}"
        for dataset in real
    ]
    if len(real) > 1:
        means = {
            name: mean
            for name in ENCODINGS
            if all(name in gains[dataset] for dataset in real)
            and (mean := together([gains[dataset][name] for dataset in real]))
        }
        if means:
            sentences.append(f"In the mean of these data sets it changes by {_told(means)}")
    made = [name for name in SYNTHETIC if name in results.datasets]
    if made:
        best = ceilings()
        room = best["with_time"] - best["time_blind"]
        for dataset in made:
            shares = [
                f"{name} {_share(gap, room)}{' (one seed)' if gap.seeds == 1 else ''}"
                for name, gap in gains[dataset].items()
            ]
            if shares:
                since = "the first visit" if dataset == "since-visit" else "1970"
                sentences.append(
                    f"On the synthetic log with times since {since}, where knowing the time is "
                    f"worth {room:.4f} at best, it gains this share of it: {join(shares)}."
                )
    return sentences or ["Only arms that cannot be compared yet have been run."]


def draw(results: Results, figure: Any) -> None:
    """The gain over the model without time, a panel for each data set."""
    gains = {d: gaps for d in results.datasets if (gaps := _gains(results, d))}
    if not gains:
        return
    drawn = panels(figure, list(map(named, gains)), sharey=False)
    for panel, (dataset, gaps) in zip(drawn, gains.items(), strict=True):
        panel.locator_params(axis="x", nbins=5)
        dots(panel, list(gaps), list(gaps.values()), COLORS[0])
        panel.axvline(0, color=COLORS[1], linewidth=1)
        if dataset in SYNTHETIC:
            best = ceilings()
            panel.axvline(best["with_time"] - best["time_blind"], color=COLORS[2], linestyle=":")
    figure.supxlabel("gain in NDCG@10 over the model without time, ± 2 standard errors", size=10)


STUDY = Study(
    name="normalisation",
    question="Is it the normalisation of time, or the idea of using time, that gives the gain?",
    hypothesis="The idea: every normalisation that keeps long and short gaps apart gains about the "
    "same, and the paper's gains nothing where times are since 1970, because its padding holds a "
    "number beside which real gaps vanish.",
    hours={"ml100k": 3, "beauty": 4, "kuairand": 3, "since-visit": 0.8, "since-1970": 0.8},
    datasets=("since-visit", "since-1970", "ml100k", "beauty", "kuairand"),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
    make={name: make_synthetic for name in SYNTHETIC},
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
