"""The frame of all studies: what a study is, its trainings, its command line.

    python -m studies.normalisation --data data --runs runs/studies

A study asks one question. Its *arms* are trainings that differ in what the question is about, on
one or several data sets. Each training is a `python train.py` in `RUNS/CONFIG/SETTINGS/SEED`, so
that studies share the trainings that they have in common. A finished one is reused, an interrupted
one goes on, and one with other settings or other data is refused. If one fails, the others go on.

What comes out are small files in `studies/results/`: NAME.csv has a row for each training,
NAME.pairs.csv the differences of arms, paired over users, NAME.details.csv whatever else the study
measures, NAME.png a picture and NAME.md the answer. Rows of earlier calls stay where no new row
replaces them, so a study can be answered piece by piece. The picture and the answer are made from
the files alone (`--report`), and say what has not run yet.

`--quick` shows that the program works, on synthetic data and with an epoch or two. Its figures
answer nothing, and are written to a folder of their own.
"""

import argparse
import csv
import dataclasses
import hashlib
import math
import shlex
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from studies.report import KEYS, Results, Row, write_report
from tim4rec_jax.commands import compare, trainings
from tim4rec_jax.commands.compare_report import Run
from tim4rec_jax.commands.results import code, hardware
from tim4rec_jax.data_prep.__main__ import main as data_prep
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_write, positive_count
from tim4rec_jax.presets import load_config
from tim4rec_jax.runtime import enable_compilation_cache

RESULTS = Path(__file__).with_name("results")
FIRST_SEED, SEEDS = 2020, 3
QUICK = "quick"  # the name of the synthetic data set of `--quick`
# Of the prepared data, the folder that only studies write to. Elsewhere a data set of the user's
# could have the name of one that a study makes, and would be taken for it.
OWN = "studies"
# A model and a training that take seconds.
QUICK_SETTINGS = (
    *("data.max_length=16", "data.buckets=(16,)", "train.epochs=1", "train.batch_size=32"),
    *("eval.batch_size=128", "train.loggers="),
)
# The same for the models that have these settings.
QUICK_SSD = (
    *("model.hidden_size=8", "model.head_dim=8", "model.num_layers=1", "model.d_state=4"),
    *QUICK_SETTINGS,
)
# A training by prefixes that ends after some epochs. The configurations wait for a long patience
# instead, and an epoch costs many times one at every position.
PREFIX = {
    name: (
        *("train.objective=prefix", "train.schedule=cosine", f"train.batch_size={rows}"),
        *(f"train.epochs={epochs}", f"train.patience={epochs}"),
    )
    for name, rows, epochs in (("ml100k", 256, 10), ("beauty", 512, 12), ("kuairand", 512, 12))
}
console = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the trainings that a study compares, but for its seed.

    Attributes:
      name: of the arm, within the study.
      dataset: the name of a configuration, such as "ml100k", or of a data set of the study.
      config: the configuration and its variant, such as "ml100k:causal".
      settings: what differs from it, as KEY=VALUE.
      factors: what the question is about, as columns of the results.
      against: the name of the arm that this one is compared with, user by user; "": none.
      data: the name of the data set if studies make it; "": that of the configuration.
    """

    name: str
    dataset: str
    config: str
    settings: tuple[str, ...] = ()
    factors: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)
    against: str = ""
    data: str = ""

    def words(self, data: Path, seed: int) -> list[str]:
        """The command line of `train.py`, without the run directory."""
        theirs = Path(load_config(self.config).dataset).name
        folder = data / OWN / self.data if self.data else data / theirs
        settings = (f"dataset={folder}", *self.settings, f"seed={seed}")
        return [f"--config={self.config}", *(f"--config.{setting}" for setting in settings)]

    def folder(self, runs: Path, seed: int) -> Path:
        """The folder of the training of a seed; studies with the same training have the same."""
        place, settings = self.config.replace(":", "-"), ",".join(sorted(self.settings))
        if self.data:
            place = f"{place} on {self.data}"
        if len(settings) > 200:  # file systems allow 255
            digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
            settings = f"{settings[:180]}~{digest}"
        return runs / place / (settings or "as it is") / str(seed)


def overridden(settings: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Settings as KEY=VALUE, with others in the place of those with the same key."""
    values = dict(setting.split("=", 1) for setting in (*settings, *others))
    return tuple(f"{key}={value}" for key, value in values.items())


@dataclasses.dataclass(frozen=True)
class Training:
    """A finished training of an arm.

    Attributes:
      arm: of the study.
      seed: of the training.
      folder: holds `run/`, what the training cost, and the ranks of the targets.
      figures: what `tim4rec_jax.commands.compare.measure` returns.
      gains: NDCG@10 of each user with a target, [U].
    """

    arm: Arm
    seed: int
    folder: Path
    figures: dict[str, Any]
    gains: np.ndarray

    def row(self, data: Path) -> Row:
        """The training as a row of NAME.csv."""
        figures, root = self.figures, math.sqrt(len(self.gains))
        told = figures["protocol"]
        protocol = ("split", "part", "order", "seen", "ties", "knows_next_time")
        trained = (self.folder / "run" / "metrics.json").stat().st_mtime
        command = ["python", "train.py", *self.arm.words(Path("data"), self.seed)]
        return {
            **{"dataset": self.arm.dataset, "arm": self.arm.name, "seed": self.seed},
            **self.arm.factors,
            **{name: told[name] for name in protocol},
            **{name: figures["test"][name] for name in ("hit@10", "ndcg@10", "mrr@10")},
            "ndcg@10_se": float(self.gains.std(ddof=1)) / root,
            "users": len(self.gains),
            "valid_ndcg@10": figures["valid"]["ndcg@10"],
            **{name: figures[name] for name in ("epochs", "best_epoch", "parameters")},
            "mflop": figures["flops"] / 1e6,
            "train_cpu_s": figures["cpu"],
            "peak_mb": figures["memory"],
            **{"hardware": hardware(figures.get("device", "")), "jax": figures.get("jax", "")},
            "code": code(),
            "date": datetime.fromtimestamp(trained, UTC).date().isoformat(),
            "command": shlex.join(command),
        }


def no_rows(*_: Any) -> Iterable[Row]:
    """Measures nothing."""
    return ()


@dataclasses.dataclass(frozen=True)
class Study:
    """A question, and how it is answered.

    Attributes:
      name: of the module, without the package.
      question: one sentence.
      hypothesis: what is expected, one or two sentences.
      hours: processor hours of the trainings of all seeds, by data set; an estimate.
      datasets: the data sets of the study.
      arms: the arms on a data set. With `quick`, few that are trained in seconds.
      draw: draws the results into an empty figure.
      verdict: whether the hypothesis holds, made from the numbers; "" if they do not say.
      answer: three sentences about the results, made from their numbers.
      measure: rows of NAME.details.csv about the finished trainings.
      bench: further such rows, which need no training; asked for with the results so far and with
        `quick`. It leaves out what the results hold already.
      make: how to make the data sets that are the study's own, by the name of their folder. A
        function is given an empty path and `quick`.
    """

    name: str
    question: str
    hypothesis: str
    hours: Mapping[str, float]
    datasets: tuple[str, ...]
    arms: Callable[[str, bool], list[Arm]]
    draw: Callable[[Results, Any], None]
    verdict: Callable[[Results], str]
    answer: Callable[[Results], list[str]]
    measure: Callable[[list[Training]], Iterable[Row]] = no_rows
    bench: Callable[[Results, bool], Iterable[Row]] = no_rows
    make: Mapping[str, Callable[[Path, bool], None]] = dataclasses.field(default_factory=dict)

    def grid(self, quick: bool = False) -> list[Arm]:
        """The arms on all data sets."""
        names = (QUICK,) if quick else self.datasets
        return [arm for name in names for arm in self.arms(name, quick)]


def train_all(
    planned: Sequence[tuple[Arm, int]], data: Path, runs: Path, processes: int
) -> tuple[list[Training], list[str]]:
    """Trains what is not finished, several at once, and measures all.

    Args:
      planned: arms with their seeds.
      data: folder of prepared data sets.
      runs: folder of the runs.
      processes: how many trainings run at the same time.

    Returns:
      The finished trainings in the order of `planned`, and a sentence for each that failed.

    Raises:
      KeyboardInterrupt: the user has stopped the study. The trainings have saved.
    """
    stop, found, problems = threading.Event(), {}, []
    with ThreadPoolExecutor(processes) as pool:
        waiting = {}
        for number, (arm, seed) in enumerate(planned):
            folder, words = arm.folder(runs, seed), arm.words(data, seed)
            try:  # here, because reading a command line is not made for threads
                done = trainings.finished(folder / "run", trainings.settings(words))
            except UserError as error:
                problems.append(f"{arm.dataset} {arm.name} {seed}: {error}")
                continue
            if done:
                future = pool.submit(str)  # no problem: ""
            else:
                future = pool.submit(trainings.train, folder, words, stop.is_set)
            waiting[future] = number
        try:
            for ended in as_completed(waiting):
                arm, seed = planned[waiting[ended]]
                named = f"{arm.dataset} {arm.name} {seed}"
                if problem := ended.result():
                    problems.append(f"{named}: {problem}")
                    said = problem
                else:
                    training = finished(arm, seed, arm.folder(runs, seed))
                    found[waiting[ended]] = training
                    said = f"NDCG@10 {training.figures['test']['ndcg@10']:.4f}"
                console.out(f"{named}: {said}")
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [found[number] for number in sorted(found)], problems


def finished(arm: Arm, seed: int, folder: Path) -> Training:
    """Measures a finished training."""
    figures = compare.measure(folder)
    ranks, ties = (np.load(folder / f"{name}.npy") for name in ("ranks", "ties"))
    gains = Run(arm.dataset, arm.name, seed, "", figures, ranks, ties).gains()
    return Training(arm, seed, folder, figures, gains)


def difference(ours: dict[int, np.ndarray], theirs: dict[int, np.ndarray]) -> Row | None:
    """How much the NDCG@10 of one arm is above that of another, for the same users.

    The difference is the mean over users and over the seeds that both arms have. Its standard error
    has two parts. `se_users` is that of the mean over users of differences that are means over
    seeds, and `se_seeds` that of the mean over seeds of differences that are means over users. Both
    contain the noise of a single user in a single training, so their root of squares `se` is too
    large rather than too small. With one seed, `se_seeds` is not known and `se` is `se_users`.

    Args:
      ours: NDCG@10 of each user [U], by seed.
      theirs: likewise.

    Returns:
      None: no seed is in both.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    gaps = np.stack([ours[seed] - theirs[seed] for seed in seeds])  # [S, U]
    users, by_seed = gaps.mean(0), gaps.mean(1)
    se_users = float(users.std(ddof=1)) / math.sqrt(len(users))
    se_seeds = float(by_seed.std(ddof=1)) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
    return {
        **{"seeds": len(seeds), "users": len(users), "difference": float(users.mean())},
        **{"se_users": se_users, "se_seeds": se_seeds},
        "se": math.hypot(se_users, se_seeds or 0.0),
    }


def by_arm(found: Sequence[Training]) -> dict[tuple[str, str], dict[int, Training]]:
    """Trainings by the data set and the name of their arm, then by seed."""
    arms: dict[tuple[str, str], dict[int, Training]] = {}
    for training in found:
        arms.setdefault((training.arm.dataset, training.arm.name), {})[training.seed] = training
    return arms


def paired(found: Sequence[Training]) -> list[Row]:
    """The `difference` of each arm and the one that it is compared with."""
    arms, rows = by_arm(found), []
    for (dataset, name), trained in arms.items():
        against = next(iter(trained.values())).arm.against
        theirs = arms.get((dataset, against), {})
        gains = [{seed: t.gains for seed, t in each.items()} for each in (trained, theirs)]
        if row := difference(*gains):
            rows.append({"dataset": dataset, "arm": name, "against": against, **row})
    return rows


def update(path: Path, rows: Iterable[Row], key: Sequence[str]) -> None:
    """Writes rows to a CSV file, in full precision; they replace those with the same key.

    A key is the values of some columns; a row has an empty text where it lacks one.
    """

    def named(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in key)

    kept: dict[tuple[str, ...], Mapping[str, Any]] = {}
    if path.exists():
        with open(path, newline="") as file:
            kept = {named(row): row for row in csv.DictReader(file)}
    kept |= {named(row): row for row in rows}
    if not kept:
        return
    columns = list(dict.fromkeys(column for row in kept.values() for column in row))
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def make_data(study: Study, planned: Sequence[Arm], data: Path, quick: bool) -> None:
    """Makes the data sets of the study's own, and that of `--quick`, where they are missing."""
    for name in dict.fromkeys(arm.data for arm in planned if arm.data):
        folder = data / OWN / name
        if (folder / "dataset.json").exists():
            continue
        folder.parent.mkdir(parents=True, exist_ok=True)
        if name in study.make:
            study.make[name](folder, quick)
        elif name == QUICK:
            data_prep(["synthetic", "--users", "150", "--items", "48", "--out", str(folder)])


def plan(chosen: Sequence[Arm], runs: Path, seeds: int) -> list[tuple[Arm, int]]:
    """The trainings to do, one seed after the other, and those of further seeds that are there.

    Otherwise a call with fewer seeds than one before would lose what is known already.
    """
    asked = [(arm, FIRST_SEED + number) for number in range(seeds) for arm in chosen]
    more = range(FIRST_SEED + seeds, FIRST_SEED + SEEDS)
    there = [(arm, seed) for seed in more for arm in chosen]
    return asked + [
        (arm, seed)
        for arm, seed in there
        if (arm.folder(runs, seed) / "run" / "metrics.json").exists()
    ]


def flags_of(study: Study, words: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line.

    Raises:
      UserError: the flags do not go together.
    """
    total = sum(study.hours.values())
    told = ", ".join(f"{name} {hours:g}" for name, hours in study.hours.items())
    parser = argparse.ArgumentParser(
        prog=f"python -m studies.{study.name}",
        description=f"{study.question} Hypothesis: {study.hypothesis} "
        f"All {SEEDS} seeds take about {total:g} processor hours ({told}).",
    )
    add = parser.add_argument
    add(
        "--datasets",
        nargs="*",
        default=list(study.datasets),
        metavar="DATASET",
        help=f"of {', '.join(study.datasets)} (default: all); without a name: no training",
    )
    add(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="names of arms (default: all); those that they are compared with come along",
    )
    add("--seeds", type=positive_count, default=SEEDS, help=f"from {FIRST_SEED} (default: {SEEDS})")
    add("--processes", type=positive_count, default=1, help="trainings at once (default: 1)")
    add("--data", type=Path, default=Path("data"), help="folder of prepared data sets")
    add("--runs", type=Path, default=Path("runs/studies"), help="folder of the trainings")
    add("--out", type=Path, help="folder of the results (default: studies/results)")
    add("--quick", action="store_true", help="on a little synthetic data, to see that it works")
    add("--report", action="store_true", help="make picture and answer again, and nothing else")
    flags = parser.parse_args(words)
    if unknown := sorted(set(flags.datasets) - set(study.datasets)):
        known = ", ".join(study.datasets)
        raise UserError(f"--datasets {unknown[0]}: the study has no such data set; it has {known}")
    if flags.quick:
        flags.runs, flags.seeds = flags.runs / "quick", 1
        flags.data = flags.runs / "data"
        flags.out = flags.out or flags.runs / "results"
        if flags.out.resolve() == RESULTS:
            raise UserError("--quick answers nothing; choose another --out than studies/results")
    flags.out = flags.out or RESULTS
    return flags


def main(study: Study, words: Sequence[str] | None = None) -> None:
    """Runs the command line of a study, or the given words.

    Raises:
      UserError: flags are wrong, or a training has failed. The results of the others are written.
    """
    flags = flags_of(study, words)
    path, problems = flags.out / f"{study.name}.csv", []
    if not flags.report:
        grid = study.grid(flags.quick)
        if unknown := sorted(set(flags.arms or ()) - {arm.name for arm in grid}):
            known = ", ".join(dict.fromkeys(arm.name for arm in grid))
            raise UserError(f"--arms {unknown[0]}: there is no such arm; there are {known}")
        chosen = [arm for arm in grid if flags.quick or arm.dataset in flags.datasets]
        if flags.arms:  # with those that they are compared with
            names = {*flags.arms, *(arm.against for arm in chosen if arm.name in flags.arms)}
            chosen = [arm for arm in chosen if arm.name in names]
        enable_compilation_cache()
        make_data(study, chosen, flags.data, flags.quick)
        planned = plan(chosen, flags.runs, flags.seeds)
        found, problems = train_all(planned, flags.data, flags.runs, flags.processes)
        flags.out.mkdir(parents=True, exist_ok=True)
        update(path, (training.row(flags.data) for training in found), KEYS["runs"])
        update(path.with_suffix(".pairs.csv"), paired(found), KEYS["pairs"])
        update(path.with_suffix(".details.csv"), study.measure(found), KEYS["details"])
        for row in study.bench(read_results(study, path, flags.quick), flags.quick):
            update(path.with_suffix(".details.csv"), [row], KEYS["details"])
    write_report(path, read_results(study, path, flags.quick), study)
    console.out(f"wrote {path.with_suffix('.md')}, its picture and its tables")
    if problems:
        raise UserError(f"{len(problems)} trainings failed: {'; '.join(problems)}")


def read_results(study: Study, path: Path, quick: bool = False) -> Results:
    """The results of a study in NAME.csv and the files beside it."""
    names = {(arm.dataset, arm.name): None for arm in study.grid(quick)}
    return Results.read(path, names, 1 if quick else SEEDS)
