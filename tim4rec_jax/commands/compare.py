"""Compares models: trains what is missing, then writes a table, a CSV file and a picture.

    python -m benchmarks.compare --datasets ml100k beauty --models tim4rec sasrec gru4rec --seeds 3

A dataset is the name of a config file, or
its path. A model is a variant of that config; `tim4rec` is the config without a variant.
`OPTION=VALUE` after a `--` goes to every training, for example `-- train.epochs=3` for a trial.
Each training is a `python train.py` in `RUNS/DATASET/MODEL/SEED`, with its output in `train.log`. A
finished run with the same settings and the same data is reused, and an interrupted run is
continued; a run with others is refused. If a run fails, the others go on, and the failure is
reported.

With `--tune 30`, the settings of each model are searched first, as `tim4rec tune` does: the same
number of trials for every model, judged on validation, in `RUNS/DATASET/MODEL/tune`. All seeds are
then trained with the best settings. The tables tell what was chosen and what the search cost.

Writes OUT.md, OUT.csv and OUT.png. They name the protocol, and hold test metrics as mean and
standard deviation over seeds with a paired test over users against the first model, and parameters,
operations, seconds and memory. The picture shows quality against cost. Seconds are processor
seconds of all threads, compilation included, because they depend less than the clock on other
programs. `--results FILE` also adds a row for each run and protocol to a table of results such as
`benchmarks/results.csv`, with the items of the history ranked and masked, and the means over seeds
with the p values of the test.
"""

import argparse
import csv
import hashlib
import importlib.util
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from tim4rec_jax.commands import trainings
from tim4rec_jax.commands.compare_report import (
    Run,
    Tuning,
    markdown,
    picture,
    print_result,
    spread,
)
from tim4rec_jax.commands.results import append, rows_of_runs
from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import ArgumentParser, UserError
from tim4rec_jax.evaluation import metrics
from tim4rec_jax.evaluation.evaluate import batch_settings, rank_targets
from tim4rec_jax.evaluation.metrics import tested
from tim4rec_jax.evaluation.protocol import protocol
from tim4rec_jax.files import named_file, positive_count, read_json, write_json
from tim4rec_jax.models import DEFAULT_MODEL
from tim4rec_jax.presets import load_config
from tim4rec_jax.run import load_model
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.training.log import flops_per_sample

FIRST_SEED = 2020
_REMEASURE = "delete it and compare again"
console = Console(highlight=False)


def variant(model: str) -> str:
    """Returns the variant of the config that trains a model."""
    return "" if model == DEFAULT_MODEL else model


def arguments(config: str, model: str, seed: int, options: list[str]) -> list[str]:
    """Returns the command line of `train.py` that trains a run, but for its directory."""
    return [
        f"--config={config}:{variant(model)}".removesuffix(":"),
        f"--config.seed={seed}",
        *(f"--config.{option}" for option in options),
    ]


def train(folder: Path, words: list[str]) -> str:
    """Trains a run unless it is finished; returns what went wrong, or an empty text.

    Args:
      folder: of the run, its log and its costs.
      words: its command line, see `arguments`.
    """
    try:
        if trainings.finished(folder / "run", trainings.settings(words)):
            return ""
    except UserError as error:
        return f"error: {error}"
    return trainings.train(folder, words)


def tune(flags: argparse.Namespace, config: str, model: str, options: list[str]) -> Tuning:
    """Searches the settings of a model on validation, with the budget that all models have.

    Raises:
      UserError: the search cannot begin or go on, or none of its trials has finished.
    """
    # The rest works without Optuna.
    from tim4rec_jax.commands import search, search_report, search_space

    words, dataset = arguments(config, model, FIRST_SEED, options), Path(config).stem
    ranges = search_space.default_space(trainings.settings(words), words)
    if not ranges:  # the model learns nothing
        return Tuning(dataset, model)
    folder = flags.runs / dataset / model / "tune"
    study = search.search(search.Plan(words, ranges, flags.tune, folder), console)
    best = search_report.best_trial(study)
    if best is None:
        raise UserError(f"no trial in {folder} has finished")
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state.name.lower() for trial in trials)
    cost = search_report.processor_seconds(study)
    return Tuning(dataset, model, dict(states), best.value or 0.0, cost, best.params)


def measure(folder: Path) -> dict:
    """Returns the figures of a finished run, and measures what its best model costs.

    The measurements are kept beside the run: in `measured.json`, and for each user the rank of the
    target in `ranks.npy` and the number of other items with its score in `ties.npy`. They are made
    again if the run was.
    """
    path = folder / "measured.json"
    digest = hashlib.sha256((folder / "run" / "metrics.json").read_bytes()).hexdigest()
    # Versions before this one kept the ranks without the ties.
    whole = path.exists() and (folder / "ties.npy").exists()
    kept = read_json(path, dict, _REMEASURE) if whole else {}
    if kept.get("run") != digest:
        config, model = load_model(folder / "run")
        data = config.data
        ds = open_dataset(config.dataset).split(data.split, data.valid_from, data.test_from)
        settings = batch_settings(config)
        rank_targets(model, ds, "test", **settings)  # compiles
        start = time.process_time()
        ranks, ties = rank_targets(model, ds, "test", **settings)
        seconds = time.process_time() - start
        np.save(folder / "ranks.npy", ranks)
        np.save(folder / "ties.npy", ties)
        ks = sorted({10, *config.eval.ks})
        best, equals = tested(ranks, ties, config.eval.ties)
        graphdef, params = nnx.split(model)
        measured = {
            "run": digest,
            "protocol": protocol(config, ds, ks=ks),
            "test": metrics(best, ks, equals),
            "inference": seconds,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "flops": flops_per_sample(graphdef, params, data.max_length),
        }
        write_json(path, measured)
    told = read_json(folder / "run" / "metrics.json", dict, _REMEASURE)
    return told | trainings.cost(folder) | read_json(path, dict, _REMEASURE)


def runs(flags: argparse.Namespace) -> tuple[list[Run], list[Tuning]]:
    """Tunes every model if asked for, then trains and measures every run.

    A run that failed holds the reason.
    """
    found, tunings = [], []
    for config in flags.datasets:
        dataset = Path(config).stem
        for model in flags.models:
            named = f"{config}:{variant(model)}".removesuffix(":")
            directory = flags.data / Path(load_config(named).dataset).name
            options, why = [f"dataset={directory}", *flags.options], ""
            if flags.tune:
                console.out(f"{dataset} {model}: search of settings")
                try:
                    tunings.append(tune(flags, config, model, options))
                    options += [f"{name}={value}" for name, value in tunings[-1].settings.items()]
                except UserError as error:
                    why = f"error: {error}"
            for seed in range(FIRST_SEED, FIRST_SEED + flags.seeds):
                folder = flags.runs / dataset / model / str(seed)
                console.out(f"{dataset} {model}, seed {seed}:", end=" ")
                problem = why or train(folder, arguments(config, model, seed, options))
                figures, ranks, ties = {}, None, None
                if not problem:
                    figures = measure(folder)
                    ranks, ties = (np.load(folder / f"{name}.npy") for name in ("ranks", "ties"))
                said = problem or f"test NDCG@10 {spread([figures['test']['ndcg@10']])}"
                console.out(said)
                found.append(Run(dataset, model, seed, problem, figures, ranks, ties))
    return found, tunings


def write_csv(path: Path, found: list[Run]) -> None:
    """Writes one line for each run, in full precision."""
    rows = [run.row() for run in found]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(words: Sequence[str] | None = None, prog: str = "python -m benchmarks.compare") -> None:
    """Runs the command line, or the given words."""
    parser = ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, help="config files, such as ml100k")
    add("--models", nargs="+", required=True, help="their variants, or tim4rec")
    add("--seeds", type=int, default=3, help="how many, from 2020 (default: 3)")
    add(
        "--tune",
        type=positive_count,
        default=0,
        metavar="N",
        help="first search the settings of each model in N trials, on validation",
    )
    add("--data", type=Path, default=Path("data"), help="folder of prepared datasets")
    add("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs")
    add("--out", type=Path, default=Path("runs/compare/table"), help="files to write, no suffix")
    add("--results", type=named_file, metavar="FILE", help="a table of results to add the runs to")
    add("options", nargs="*", metavar="-- OPTION=VALUE", help="settings for every training")
    flags = parser.parse_args(words)
    if flags.tune and importlib.util.find_spec("optuna") is None:
        raise UserError("--tune needs Optuna: pip install 'tim4rec-jax[tune]'")
    for config in flags.datasets:
        for model in flags.models:  # a mistake is found before the first training
            load_config(f"{config}:{variant(model)}".removesuffix(":"))
    enable_compilation_cache()
    found, tunings = runs(flags)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    page, table, drawn = (Path(f"{flags.out}{suffix}") for suffix in (".md", ".csv", ".png"))
    page.write_text(markdown(found, tunings))
    write_csv(table, found)
    picture(found, drawn)
    print_result(console, found)
    wrote = f"wrote {flags.out}.md, .csv and .png"
    console.out(wrote)
    finished = [run for run in found if flags.results and not run.problem]
    for dataset in dict.fromkeys(run.dataset for run in finished):
        folders: dict[str, list[Path]] = {}
        for run in finished:
            if run.dataset == dataset:
                folder = flags.runs / dataset / run.model / str(run.seed) / "run"
                folders.setdefault(run.model, []).append(folder)
        first = folders.get(flags.models[0], [])
        append(flags.results, rows_of_runs(itertools.chain(*folders.values()), first))
    if failed := [run for run in found if run.problem]:
        raise UserError(f"{len(failed)} of {len(found)} runs failed; their train.log says why")
