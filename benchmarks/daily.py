r"""Replays a log day by day: a training from yesterday's run against a training anew.

    python -m benchmarks.daily events.csv.gz --config kuairand:causal --slices 14 --first 8 \
        --warm epochs=2 --warm epochs=2,init_optimizer=rewarm -- model.hidden_size=32

The time of the log is cut into equal slices, the days. After each day from `--first` on, all events
until then are prepared as `python -m data_prep table` does, and trained on: once anew, and once for
each `--warm`, which begins with its own run of the day before. `--warm` lists settings of `train.`
that differ. All settings after `--` go to every training. The last events of the day (`--held-out`)
validate and the rest trains, in all of them. So the best epoch is chosen without the next day.

Each run is asked for the next day: every event of it is ranked among all items that the run knows,
after all events of its user before it, those of the same day too. Events of a user without any
event before are left out. Items that the run does not know count as ranked last. So runs of a day
are asked the same, whatever they know.

Trainings are processes, and their cost is the processor time of all their threads, start and
compilation included. The table also says how much of it does not depend on the number of epochs.
Finished runs are reused. Writes OUT.md, and OUT.csv with a row for each run.
"""

import argparse
import dataclasses
import datetime
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from tim4rec_jax.commands.compare import train
from tim4rec_jax.commands.results import COLUMNS, append, code, hardware
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data.dataset import Chunk
from tim4rec_jax.data.format import read_items, read_metadata
from tim4rec_jax.data.splits import format_time
from tim4rec_jax.data_prep.__main__ import main as data_prep
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate
from tim4rec_jax.evaluation.evaluate import batch_settings
from tim4rec_jax.evaluation.metrics import metrics
from tim4rec_jax.files import read_json
from tim4rec_jax.presets import load_config
from tim4rec_jax.run import load_model, read_figures
from tim4rec_jax.runtime import enable_compilation_cache

ANEW = "anew"
console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a training and of the day after it.

    Attributes:
      day: the number of the last day that it knows, from 1.
      arm: `ANEW`, or the settings of a warm start.
      seconds: processor time of the training.
      events: number of events in its data.
      ranks: of the events of the next day.
      run: what `metrics.json` of the run holds.
    """

    day: int
    arm: str
    seconds: float
    events: int
    ranks: np.ndarray
    run: dict[str, Any]


def next_events(
    log: Dataset, items: pa.ChunkedArray, since: int, until: int
) -> tuple[Dataset, int]:
    """The events of a time as the questions of an evaluation.

    Args:
      log: all events.
      items: the ids of the items that a run knows, in the order of their indices.
      since: the first moment of the questions, in seconds since 1970.
      until: the first moment after them.

    Returns:
      A dataset with a row for each event of that time that a run can be asked for: the events of
      the user that come before, and the event itself, which is the test target. And the number of
      events whose item the run does not know.
    """
    place = pc.call_function("index_in", [log.item_ids], pc.SetLookupOptions(items))
    index = np.append(0, pc.fill_null(place, -1).to_numpy() + 1).astype(np.int32)
    found = np.concatenate([chunk.items for chunk in log.chunks])
    times = np.concatenate([chunk.timestamps for chunk in log.chunks])
    user = np.repeat(np.arange(log.n_users), log.lengths)
    kept = index[found] > 0
    # For each event, the number of known events of its user before it.
    known_before = np.cumsum(kept) - kept
    before = known_before - known_before[log.offsets[user]]
    asked = (times >= since) & (times < until) & (before > 0)
    ends = known_before[asked & kept]
    lengths = before[asked & kept] + 1
    events, moments = index[found][kept], times[kept]
    places = np.repeat(ends + 1 - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
    questions = dataclasses.replace(
        log,
        user_ids=pa.chunked_array([pa.array([str(row) for row in range(len(ends))], pa.string())]),
        item_ids=items,
        item_counts=np.bincount(events, minlength=len(items) + 1)[1:],
        offsets=np.append(0, np.cumsum(lengths)),
        chunks=(Chunk(events[places], moments[places], start=0),),
    )
    return questions, int((asked & ~kept).sum())


def ranks_of(run: Path, log: Dataset, since: int, until: int) -> np.ndarray:
    """The rank of each event of a time by the model of a run."""
    config, model = load_model(run)
    items = read_items(run, read_metadata(run)).column("item")
    questions, unknown = next_events(log, items, since, until)
    _, ranks = evaluate(model, questions, "test", **batch_settings(config))
    return np.append(ranks[ranks > 0], np.full(unknown, len(items) + 1))


def replay(flags: argparse.Namespace, log: Dataset) -> Iterator[Outcome]:
    """Trains and asks, day by day."""
    times = np.concatenate([chunk.timestamps for chunk in log.chunks])
    edges = np.linspace(times.min(), times.max() + 1, flags.slices + 1).astype(int)
    edges = [int(edge) for edge in edges]
    for day in range(flags.first, (flags.last or flags.slices - 1) + 1):
        end, length = edges[day], edges[day] - edges[day - 1]
        data = flags.runs / f"day{day}" / "data"
        if not data.exists():
            prepare(flags, data, ["--until", format_time(end), "--k-core", str(flags.k_core)])
        events = open_dataset(data).n_events
        share = flags.held_out * length
        common = [
            f"dataset={data}",
            "data.split=global_time",
            f"data.valid_from={int(end - share)}",
            f"data.test_from={int(end - share / 2)}",
            *flags.options,
        ]
        for arm in (ANEW, *flags.warm):
            if day == flags.first and arm != ANEW:
                continue
            folder = flags.runs / f"day{day}" / arm.replace("=", "-").replace(",", "_")
            words = [f"--config={flags.config}", f"--workdir={folder / 'run'}"]
            words += [f"--config.{option}" for option in common]
            if arm != ANEW:
                before = ANEW if day - 1 == flags.first else folder.name
                words += [f"--config.train.{setting}" for setting in arm.split(",")]
                words.append(f"--init-from={flags.runs / f'day{day - 1}' / before / 'run'}")
            if problem := train(folder, words):
                raise UserError(f"{folder}: {problem}")
            cost = read_json(folder / "cost.json", dict[str, float], "delete the folder")["cpu"]
            ranks = ranks_of(folder / "run", log, end, edges[day + 1])
            found = metrics(ranks)["ndcg@10"]
            console.print(f"day {day}, {arm}: NDCG@10 of the next day {found:.4f}, {cost:.0f} s")
            yield Outcome(day, arm, cost, events, ranks, read_figures(folder / "run"))


def prepare(flags: argparse.Namespace, out: Path, words: list[str]) -> None:
    """Prepares the log as a dataset."""
    data_prep(
        ["table", "--source", *flags.log, *shlex.split(flags.prepare), *words, "--out", str(out)]
    )


def markdown(found: list[Outcome], arms: Sequence[str]) -> str:
    """The figures of all days, and their means."""
    by_arm = {arm: {each.day: each for each in found if each.arm == arm} for arm in arms}
    days = sorted(set.intersection(*(set(outcomes) for outcomes in by_arm.values())))
    lines = ["| trained until day | " + " | ".join(arms) + " | events asked |"]
    lines.append("|---" * (len(arms) + 2) + "|")

    def row(name: str, cells: list[str], last: str) -> None:
        lines.append(f"| {name} | {' | '.join(cells)} | {last} |")

    for day in days:
        outcomes = [by_arm[arm][day] for arm in arms]
        cells = [f"{metrics(o.ranks)['ndcg@10']:.4f} ({o.seconds:.0f} s)" for o in outcomes]
        row(str(day), cells, f"{len(outcomes[0].ranks):,}")
    totals = []
    for arm in arms:
        outcomes = [by_arm[arm][day] for day in days]
        figures = metrics(np.concatenate([o.ranks for o in outcomes]))
        totals.append((figures, sum(o.seconds for o in outcomes)))
    anew, cost = totals[0]
    for name in ("ndcg@10", "hit@10", "mrr@10"):
        cells = [
            f"{figures[name]:.4f} ({figures[name] / anew[name] - 1:+.1%})" for figures, _ in totals
        ]
        row(f"all events, {name}", cells, "")
    row("processor seconds", [f"{seconds:.0f} ({seconds / cost:.2f})" for _, seconds in totals], "")
    fixed, epoch = costs(found)
    if epoch > 0:
        rest = [seconds - len(days) * fixed for _, seconds in totals]
        cells = [f"{seconds:.0f} ({seconds / rest[0]:.2f})" for seconds in rest]
        row(f"the same, but {fixed:.0f} of each training", cells, "")
    return "\n".join(lines) + "\n"


def costs(found: list[Outcome]) -> tuple[float, float]:
    """Splits the cost of trainings by least squares.

    Returns:
      The processor seconds of a training that do not depend on its epochs: start, compilation,
      test. And those of an epoch of the mean number of training events.
    """
    epochs = np.array([each.run["epochs"] * each.events for each in found], float)
    seconds = np.array([each.seconds for each in found])
    mean = np.mean([each.events for each in found])
    terms = np.stack([np.ones(len(found)), epochs / mean], axis=1)
    fixed, epoch = np.linalg.lstsq(terms, seconds, rcond=None)[0]
    return float(fixed), float(epoch)


def rows(flags: argparse.Namespace, found: list[Outcome], name: str) -> Iterator[dict[str, str]]:
    """The runs as rows of a table of results."""
    config, _, variant = flags.config.partition(":")
    for each in found:
        warm = [f"train.{setting}" for setting in each.arm.split(",") if each.arm != ANEW]
        figures = {key: f"{value:.6f}" for key, value in metrics(each.ranks).items()}
        yield dict.fromkeys(COLUMNS, "") | {
            "dataset": name,
            "config": config,
            "variant": variant,
            "settings": " ".join([*flags.options, *warm]),
            "model": load_config(flags.config).model.name,
            "seed": str(each.run["seed"]),
            "split": f"next_day: events of day {each.day + 1} of {flags.slices}",
            "part": "test",
            "order": "exact",
            "seen": "ranked",
            "ties": "optimistic",
            "knows_next_time": "no",
            **{key: value for key, value in figures.items() if key in COLUMNS},
            "epochs": str(each.run["epochs"]),
            "best_epoch": str(each.run["best_epoch"]),
            "train_cpu_s": f"{each.seconds:.0f}",
            "hardware": hardware(""),
            "jax": jax.__version__,
            "code": code(),
            "command": shlex.join(["python", "-m", "benchmarks.daily", *flags.words]),
            "date": datetime.date.today().isoformat(),
            "note": f"trained until day {each.day}, "
            + ("anew" if each.arm == ANEW else "begun with the run of the day before"),
        }


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line, or the given words."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.daily",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("log", nargs="+", help="files of the log, as `data_prep table` takes them")
    add("--prepare", default="", help="further flags of `data_prep table`, in one text")
    add("--k-core", type=int, default=5, help="of the preparation of a day (default: 5)")
    add("--config", default="causal", help="configuration of all trainings (default: causal)")
    add("--slices", type=int, required=True, help="number of days that the log is cut into")
    add("--first", type=int, required=True, help="the first day, after which all begin alike")
    add("--last", type=int, help="the last day (default: the last but one of the log)")
    add("--warm", action="append", default=[], help="settings of a warm start, e.g. epochs=2")
    add("--held-out", type=float, default=0.1, help="share of a day that validates (default: .1)")
    add("--runs", type=Path, default=Path("runs/daily"), help="folder of the runs")
    add("--out", type=Path, default=Path("runs/daily/table"), help="files to write, no suffix")
    add("--name", default="log", help="of the log, in the tables of results")
    add("--results", type=Path, help="table of results to add the runs to")
    words = list(sys.argv[1:] if words is None else words)
    cut = words.index("--") if "--" in words else len(words)
    flags = parser.parse_args(words[:cut])
    flags.words, flags.options = words, words[cut + 1 :]
    if not 0 < flags.first <= (flags.last or flags.slices - 1) < flags.slices:
        parser.error(
            "--first and --last must be days before the last one of the log, in this order"
        )
    enable_compilation_cache()
    if not (flags.runs / "log").exists():
        prepare(flags, flags.runs / "log", ["--k-core", "1"])
    log = open_dataset(flags.runs / "log")
    found = list(replay(flags, log))
    table = markdown(found, [ANEW, *flags.warm])
    flags.out.with_suffix(".md").write_text(table)
    flags.out.with_suffix(".csv").unlink(missing_ok=True)
    append(flags.out.with_suffix(".csv"), rows(flags, found, flags.name))
    if flags.results:
        append(flags.results, rows(flags, found, flags.name))
    console.print(table, markup=False)
    console.print(f"wrote {flags.out}.md and .csv")


if __name__ == "__main__":
    main()
