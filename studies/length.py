"""How do quality and cost change with the length of the history?

    python -m studies.length

Quality: SSD, SSM (the selective scan of Mamba), attention and a recurrence (LRU) are trained with
histories of 25 to 800 events. On Beauty and on the KuaiRand slice, where fewer than one history in
a hundred is longer than 50, they are trained with 12 to 50. The number of positions in a batch
stays the same.

Cost: one layer of each kind, 64 wide, forward and backward, on rows of 64 to 65,536 positions. A
call has at least 8,192 positions, so that short rows are not the cost of starting a program, and
two rows, because XLA sums the gradients of a single long row several times slower on a CPU. Times
are processor seconds of all threads for a position, the median of a few calls. Beside the measured
curves stand those of a model: floating-point operations, and bytes if each array is written once
and read once. One factor for each, fitted to the layer's own times, turns them into time. Attention
ends where its weights no longer fit into 2 GB.
"""

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from studies.report import COLORS, Estimate, Results, Row, join, named, panels, select
from studies.study import QUICK, QUICK_SETTINGS, QUICK_SSD, Arm, Study, main, overridden
from tim4rec_jax.commands.results import code, hardware
from tim4rec_jax.errors import run_main
from tim4rec_jax.layers import CausalSSD
from tim4rec_jax.layers.attention import Attention, causal_mask
from tim4rec_jax.layers.lru import LRU
from tim4rec_jax.layers.mamba import Mamba
from tim4rec_jax.ssd.xla import default_chunk_size

MODELS = {"SSD": "causal", "SSM": "mamba4rec", "attention": "sasrec", "recurrence": "lrurec"}


class Grid(NamedTuple):
    """The trainings of a data set.

    Attributes:
      lengths: of the longest history, in events.
      epochs: of each training.
      positions: in a batch of it.
    """

    lengths: tuple[int, ...]
    epochs: int
    positions: int


GRIDS = {
    QUICK: Grid((8, 16), epochs=1, positions=512),
    "ml100k": Grid((25, 50, 100, 200, 400, 800), epochs=20, positions=1600),
    "ml1m": Grid((25, 50, 100, 200, 400, 800), epochs=25, positions=1600),
    "beauty": Grid((12, 25, 50), epochs=12, positions=1600),
    "kuairand": Grid((12, 25, 50), epochs=12, positions=3200),
}
COSTS = tuple(2**k for k in range(6, 17, 2))
LEAST, REPEATS, MEMORY = 8192, 5, 2e9  # positions of a call, calls, bytes of attention's weights

WIDTH, INNER, STATE, HEADS, TAPS = 64, 128, 32, 4, 4


def arms(dataset: str, quick: bool) -> list[Arm]:
    """All kinds of layers at all lengths; with `quick` two of each."""
    found = []
    grid = GRIDS[dataset]
    for name, variant in MODELS.items():
        for length in grid.lengths:
            if quick and name not in ("SSD", "attention"):
                continue
            settings = (
                f"data.max_length={length}",
                "train.objective=every_position",
                "train.schedule=cosine",
                "model.repeat_bias=True",
            )
            if quick:
                tiny = QUICK_SSD if name == "SSD" else QUICK_SETTINGS
                if name == "attention":
                    tiny += ("model.hidden_size=8", "model.n_layers=1")
                settings = overridden(tiny, (*settings, f"data.buckets=({length},)"))
            else:
                rows, epochs = max(grid.positions // length, 2), grid.epochs
                settings += (f"train.batch_size={rows}",)
                settings += (f"train.epochs={epochs}", f"train.patience={epochs}")
            found.append(
                Arm(
                    f"{name} {length}",
                    dataset,
                    f"{'quickstart' if quick else dataset}:{variant}",
                    settings,
                    {"layer": name, "length": length},
                    against=f"{name} {8 if quick else 50}" if length not in (8, 50) else "",
                    data=QUICK if quick else "",
                )
            )
    return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
      make: the layer.
      flops: floating-point operations of a position forward, by length of the row.
      numbers: numbers that are written and read for a position, by length; 4 bytes each.
    """

    make: Callable[[nnx.Rngs], Any]
    flops: Callable[[int], float]
    numbers: Callable[[int], float]


def _ssd_flops(length: int) -> float:
    chunk = default_chunk_size(length)
    maps = 2 * WIDTH * (2 * INNER + 2 * STATE + HEADS) + 2 * INNER * WIDTH
    # In a chunk: C B and the mask's product; between chunks: states made, passed on and read.
    return maps + 2 * TAPS * (INNER + 2 * STATE) + 2 * chunk * (STATE + INNER) + 4 * INNER * STATE


def _ssm_flops(length: int) -> float:
    del length
    rank = math.ceil(WIDTH / 16)
    maps = 6 * WIDTH * INNER + 2 * INNER * (rank + 2 * STATE) + 2 * rank * INNER
    return maps + 2 * TAPS * INNER + 9 * INNER * STATE


KINDS = {
    "SSD": Kind(
        lambda rngs: CausalSSD(WIDTH, rngs=rngs),
        _ssd_flops,
        # The mask of a chunk for each head, the states at its end, and the arrays of the block.
        lambda n: (
            HEADS * default_chunk_size(n)
            + INNER * STATE / default_chunk_size(n)
            + (8 * INNER + 4 * STATE + 4 * WIDTH)
        ),
    ),
    "SSM": Kind(
        lambda rngs: Mamba(WIDTH, rngs=rngs),
        _ssm_flops,
        lambda n: INNER * STATE + 8 * INNER + 4 * WIDTH,
    ),
    "attention": Kind(
        lambda rngs: Attention(WIDTH, HEADS, rngs=rngs),
        lambda n: 8 * WIDTH**2 + 4 * n * WIDTH,
        lambda n: 3 * HEADS * n + 8 * WIDTH,
    ),
    "recurrence": Kind(
        lambda rngs: LRU(WIDTH, rngs=rngs),
        lambda n: 8 * WIDTH * 2 * WIDTH + 8 * 2 * WIDTH,
        lambda n: 8 * WIDTH + 4 * WIDTH,
    ),
}


def processor_seconds(kind: str, length: int, least: int, repeats: int) -> tuple[float, float]:
    """The processor time of a position, forward and backward: the median, and a standard error.

    The error is that of a median of normal values, from the quartiles.
    """
    batch = max(2, least // length)
    layer = KINDS[kind].make(nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    h = jnp.asarray(np.random.default_rng(0).normal(size=(batch, length, WIDTH)), jnp.float32)

    def loss(params, h):
        layer: Any = nnx.merge(graphdef, params)
        mixed = layer(h, causal_mask(length), causal=True) if kind == "attention" else layer(h)
        return jnp.sum(mixed**2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, h).compile()
    jax.block_until_ready(program(params, h))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(program(params, h))
        times.append((time.process_time() - start) / (batch * length))
    quartiles = np.quantile(times, (0.25, 0.75))
    error = 1.2533 * (quartiles[1] - quartiles[0]) / 1.349 / math.sqrt(repeats)
    return statistics.median(times), float(error)


def bench(results: Results, quick: bool) -> Iterator[Row]:
    """The cost of each kind of layer by length, and what the model of it says.

    To measure a cost again, remove its row from `length.details.csv`.
    """
    for kind, layer in KINDS.items():
        measured = costs(results, kind)
        for length in COSTS[:2] if quick else COSTS:
            if length in measured:
                continue
            least = 128 if quick else LEAST
            weights = 4.0 * HEADS * length * max(length, least)
            if kind == "attention" and 4 * weights > MEMORY:  # forward, backward, and both softmax
                continue
            seconds, error = processor_seconds(kind, length, least, 2 if quick else REPEATS)
            yield {
                **{"dataset": "", "arm": kind, "seed": "", "what": "cost", "at": length},
                **{"length": length, "cpu_s": seconds, "se": error},
                # Backward takes twice the products of forward.
                **{"flops": 3 * layer.flops(length), "bytes": 3 * 8 * layer.numbers(length)},
                **{"hardware": hardware(""), "jax": jax.__version__, "code": code()},
                "cores": os.cpu_count(),
            }


def costs(results: Results, kind: str) -> dict[int, Estimate]:
    """The measured processor seconds of a position by length."""
    rows = select(results.details, what="cost", arm=kind)
    found = {row["length"]: Estimate(row["cpu_s"], row["se"], 1) for row in rows}
    return dict(sorted(found.items()))


def modelled(results: Results, kind: str, column: str) -> dict[int, float]:
    """The model's seconds by length, from "flops" or "bytes", with one factor for the layer."""
    rows = select(results.details, what="cost", arm=kind)
    if not rows:
        return {}
    factor = statistics.geometric_mean([row["cpu_s"] / row[column] for row in rows])
    formula = KINDS[kind].flops if column == "flops" else KINDS[kind].numbers
    scale = 3 if column == "flops" else 24
    return {length: factor * scale * formula(length) for length in COSTS}


def crossing(one: dict[int, Estimate], other: dict[int, Estimate]) -> tuple[int, int] | None:
    """The lengths between which the first of two curves becomes the dearer one for good."""
    lengths = sorted(one.keys() & other.keys())
    dearer = [one[length].value > other[length].value for length in lengths]
    for place in range(1, len(lengths)):
        if not dearer[place - 1] and all(dearer[place:]):
            return lengths[place - 1], lengths[place]
    return None


def _compared(results: Results, dataset: str, kind: str, lengths: list[int]) -> str:
    """The best length on validation, and which lengths the test tells from 50."""
    valid = {
        n: level.value
        for n in lengths
        if (level := results.level("valid_ndcg@10", dataset=dataset, layer=kind, length=n))
    }
    best = max(valid, key=lambda n: valid[n])
    gaps = {n: results.difference(dataset, f"{kind} {n}") for n in lengths}
    clear = [f"{n} ({gap})" for n, gap in gaps.items() if gap and gap.clear]
    tested = (
        f"with {join(clear)} it differs clearly from 50"
        if clear
        else "none differs clearly from 50"
    )
    return f"on validation {best} events are best, and on the test {tested}"


def verdict(results: Results) -> str:
    """Where the length of the history tells, and how the cost of attention compares."""
    gaps = {
        (dataset, row["arm"]): (row["length"], gap)
        for dataset in results.datasets
        for row in results.select(dataset=dataset)
        if (gap := results.difference(dataset, row["arm"]))
    }
    if not gaps:
        return ""
    shorter = [gap for length, gap in gaps.values() if length < 50]
    longer = [gap for length, gap in gaps.values() if length > 50]
    worse = sum(gap.clear and gap.value < 0 for gap in shorter)
    better = sum(gap.clear and gap.value > 0 for gap in longer)
    text = (
        f"Quality: {worse} of {len(shorter)} models with fewer than 50 events are clearly worse "
        "than with 50"
    )
    if longer:
        text += f", and {better} of {len(longer)} with more are clearly better"
    measured = {kind: found for kind in KINDS if len(found := costs(results, kind)) > 1}
    if "attention" not in measured or "SSD" not in measured:
        return f"{text}."
    ratio = {
        kind: found[max(found)].value / found[min(found)].value for kind, found in measured.items()
    }
    told = join([f"{kind} {ratio[kind]:.1f}" for kind in measured if kind != "attention"])
    found = crossing(measured["attention"], measured["SSD"])
    where = (
        f"between {found[0]:,} and {found[1]:,} events" if found else "nowhere that was measured"
    )
    return (
        f"{text}. Cost: from the shortest to the longest row that of a position grows by a factor "
        f"of {told}, and attention becomes dearer than SSD {where}."
    )


def answer(results: Results) -> list[str]:
    """What length does to quality, what it does to cost, and where the kinds cross."""
    sentences = []
    for dataset in results.datasets:
        for kind in MODELS:
            levels = {
                row["length"]: results.level(dataset=dataset, arm=row["arm"])
                for row in results.select(dataset=dataset, layer=kind)
            }
            known = {length: level for length, level in levels.items() if level}
            if len(known) > 1:
                told = join([f"{level} at {length}" for length, level in sorted(known.items())])
                rest = _compared(results, dataset, kind, sorted(known))
                sentences.append(f"On {named(dataset)} {kind} has NDCG@10 {told}; {rest}.")
    measured = {kind: costs(results, kind) for kind in KINDS}
    measured = {kind: found for kind, found in measured.items() if len(found) > 1}
    for kind, found in measured.items():
        shortest, longest = min(found), max(found)
        first, last = found[shortest], found[longest]
        ratio = last.value / first.value
        error = ratio * math.hypot(last.error / last.value, first.error / first.value)
        sentences.append(
            f"A position costs {kind} {1e6 * first.value:.2f} us of processor time in rows of "
            f"{shortest:,} and {ratio:.2f} ± {error:.2f} times that in rows of {longest:,}."
        )
    if "attention" in measured:
        for kind in (kind for kind in measured if kind != "attention"):
            found = crossing(measured["attention"], measured[kind])
            sentences.append(
                f"Attention becomes dearer than {kind} between {found[0]:,} and {found[1]:,}."
                if found
                else f"Attention and {kind} do not cross at the measured lengths."
            )
    return sentences or ["Neither quality nor cost has been measured yet."]


def draw(results: Results, figure: Any) -> None:
    """Quality by length, and cost by length with the models beside it."""
    datasets = results.datasets
    measured = [kind for kind in KINDS if costs(results, kind)]
    titles = [named(dataset) for dataset in datasets] + ["cost of a layer"] * bool(measured)
    if not titles:
        return
    drawn = panels(figure, titles)
    colors = dict(zip(KINDS, COLORS, strict=False))
    for panel, dataset in zip(drawn, datasets, strict=False):
        for kind in MODELS:
            rows = results.select(dataset=dataset, layer=kind)
            lengths = sorted({row["length"] for row in rows})
            if not lengths:
                continue
            levels = [results.level(dataset=dataset, layer=kind, length=n) for n in lengths]
            values = [level.value for level in levels if level]
            errors = [level.error for level in levels if level]
            panel.errorbar(lengths, values, errors, fmt="o-", label=kind, color=colors[kind])
        panel.set(xscale="log", xlabel="longest history, events", ylabel="test NDCG@10")
        lengths = sorted({row["length"] for row in results.select(dataset=dataset)})
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.minorticks_off()
        panel.legend(frameon=False, fontsize=8)
    for kind in measured:
        found = costs(results, kind)
        values = [1e6 * each.value for each in found.values()]
        drawn[-1].plot(list(found), values, "o-", color=colors[kind], label=kind, markersize=4)
        for column, style in (("flops", ":"), ("bytes", "--")):
            model = {n: s for n, s in modelled(results, kind, column).items() if n >= min(found)}
            seconds = [1e6 * each for each in model.values()]
            drawn[-1].plot(list(model), seconds, style, color=colors[kind], linewidth=1)
    if measured:
        drawn[-1].set(xscale="log", yscale="log", xlabel="length of a row (: FLOPs, -- bytes)")
        drawn[-1].set_ylabel("processor time of a position, us")
        drawn[-1].legend(frameon=False, fontsize=8)


STUDY = Study(
    name="length",
    question="How do quality and cost change with the length of the history, for SSD, SSM, "
    "attention and recurrence?",
    hypothesis="Quality rises up to the length of most histories and stays there. The cost of a "
    "position stays the same for SSD, SSM and recurrence, and that of attention passes theirs at a "
    "few hundred positions on a CPU.",
    hours={"ml100k": 5, "beauty": 3, "kuairand": 2, "ml1m": 60},
    datasets=("ml100k", "beauty", "kuairand", "ml1m"),
    arms=arms,
    draw=draw,
    verdict=verdict,
    answer=answer,
    bench=bench,
)

if __name__ == "__main__":
    sys.exit(run_main(lambda: main(STUDY)))
