"""Compares models: trains what is missing, then writes a table, a CSV file and a picture.

    python -m benchmarks.compare --datasets ml100k beauty --models tim4rec sasrec gru4rec --seeds 3

A dataset is the name of a config file, or
its path. A model is a variant of that config; `tim4rec` is the config without a variant.
`OPTION=VALUE` after a `--` goes to every training, for example `-- train.epochs=3` for a trial.
Each training is a `python train.py` in `RUNS/DATASET/MODEL/SEED`, with its output in `train.log`. A
finished run with the same settings and the same data is reused, and an interrupted run is
continued; a run with others is refused. If a run fails, the others go on, and the failure is
reported.

Writes OUT.md, OUT.csv and OUT.png. They name the protocol, and hold test metrics as mean and
standard deviation over seeds with a paired test over users against the first model, and parameters,
operations, seconds and memory. The picture shows quality against cost. Seconds are processor
seconds of all threads, compilation included, because they depend less than the clock on other
programs. `--results FILE` also adds a row for each run and protocol to a table of results such as
`benchmarks/results.csv`, with the items of the history ranked and masked.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from tim4rec_jax.cli import parse
from tim4rec_jax.commands.compare_report import Run, markdown, picture
from tim4rec_jax.commands.results import append, rows_of_run
from tim4rec_jax.data import open_dataset
from tim4rec_jax.data.format import DATASET_FILE, read_metadata
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import metrics
from tim4rec_jax.evaluation.evaluate import batch_settings, rank_targets
from tim4rec_jax.evaluation.metrics import tested
from tim4rec_jax.evaluation.protocol import protocol
from tim4rec_jax.files import named_file
from tim4rec_jax.models import DEFAULT_MODEL
from tim4rec_jax.presets import load_config
from tim4rec_jax.run import check_same_dataset, check_unchanged, load_model
from tim4rec_jax.runtime import enable_compilation_cache
from tim4rec_jax.training.log import flops_per_sample

FIRST_SEED = 2020
console = Console()


def variant(model: str) -> str:
    """Returns the variant of the config that trains a model."""
    return "" if model == DEFAULT_MODEL else model


def arguments(folder: Path, config: str, model: str, seed: int, options: list[str]) -> list[str]:
    """Returns the command line of `train.py` that trains a run."""
    return [
        f"--config={config}:{variant(model)}".removesuffix(":"),
        f"--workdir={folder / 'run'}",
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
        if finished(folder / "run", words):
            return ""
    except UserError as error:
        return f"error: {error}"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tim4rec_jax", "train", *words]
    with open(folder / "train.log", "a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except KeyboardInterrupt:
            process.wait()  # it was interrupted too, and saves
            raise
    _add_cost(folder / "cost.json", usage)
    if process.returncode == 0:
        return ""
    lines = (folder / "train.log").read_text().strip().splitlines()
    return lines[-1] if lines else f"exit code {process.returncode}"


def finished(run: Path, words: list[str]) -> bool:
    """Whether the run of this command line is there and finished.

    Raises:
      UserError: another run is there, with other settings or of other data.
    """
    config, _ = parse(["train.py", *words], usage="")
    if (run / "config.json").exists():
        check_unchanged(config, run / "config.json")
    if not (run / "metrics.json").exists():
        return False
    check_same_dataset(
        Path(config.dataset), read_metadata(Path(config.dataset)), run / DATASET_FILE
    )
    return True


def _add_cost(path: Path, usage) -> None:
    """Adds up the processor time of all starts of a run and keeps its largest memory."""
    before = json.loads(path.read_text()) if path.exists() else {"cpu": 0.0, "memory": 0.0}
    cost = {
        "cpu": before["cpu"] + usage.ru_utime + usage.ru_stime,
        "memory": max(before["memory"], usage.ru_maxrss / 1024),
    }
    path.write_text(json.dumps(cost))


def measure(folder: Path) -> dict:
    """Returns the figures of a finished run, and measures what its best model costs.

    The measurements are kept beside the run: in `measured.json`, and for each user the rank of the
    target in `ranks.npy` and the number of other items with its score in `ties.npy`. They are made
    again if the run was.
    """
    path = folder / "measured.json"
    digest = hashlib.sha256((folder / "run" / "metrics.json").read_bytes()).hexdigest()
    if not path.exists() or json.loads(path.read_text()).get("run") != digest:
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
        path.write_text(json.dumps(measured))
    told = json.loads((folder / "run" / "metrics.json").read_text())
    cost = {"cpu": float("nan"), "memory": float("nan")}
    if (folder / "cost.json").exists():
        cost = json.loads((folder / "cost.json").read_text())
    return told | cost | json.loads(path.read_text())


def runs(flags: argparse.Namespace) -> list[Run]:
    """Trains and measures every run; a run that failed holds the reason."""
    found = []
    for config in flags.datasets:
        dataset = Path(config).stem
        for model in flags.models:
            named = f"{config}:{variant(model)}".removesuffix(":")
            directory = flags.data / Path(load_config(named).dataset).name
            for seed in range(FIRST_SEED, FIRST_SEED + flags.seeds):
                folder = flags.runs / dataset / model / str(seed)
                console.print(f"{dataset} {model} {seed}", end=" ", highlight=False)
                options = [f"dataset={directory}", *flags.options]
                problem = train(folder, arguments(folder, config, model, seed, options))
                figures, ranks, ties = {}, None, None
                if not problem:
                    figures = measure(folder)
                    ranks, ties = (np.load(folder / f"{name}.npy") for name in ("ranks", "ties"))
                said = problem or "NDCG@10 {test[ndcg@10]:.4f}".format(**figures)
                console.print(said, highlight=False)
                found.append(Run(dataset, model, seed, problem, figures, ranks, ties))
    return found


def write_csv(path: Path, found: list[Run]) -> None:
    """Writes one line for each run, in full precision."""
    rows = [run.row() for run in found]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command line, or the given words."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--datasets", nargs="+", required=True, help="config files, such as ml100k")
    add("--models", nargs="+", required=True, help="their variants, or tim4rec")
    add("--seeds", type=int, default=3, help="how many, from 2020 (default: 3)")
    add("--data", type=Path, default=Path("data"), help="folder of prepared datasets")
    add("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs")
    add("--out", type=Path, default=Path("runs/compare/table"), help="files to write, no suffix")
    add("--results", type=named_file, metavar="FILE", help="a table of results to add the runs to")
    add("options", nargs="*", metavar="-- OPTION=VALUE", help="settings for every training")
    flags = parser.parse_args(words)
    for config in flags.datasets:
        for model in flags.models:  # a mistake is found before the first training
            load_config(f"{config}:{variant(model)}".removesuffix(":"))
    enable_compilation_cache()
    found = runs(flags)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.with_suffix(".md").write_text(markdown(found))
    write_csv(flags.out.with_suffix(".csv"), found)
    picture(found, flags.out.with_suffix(".png"))
    console.print(f"wrote {flags.out}.md, .csv and .png", highlight=False)
    for run in found if flags.results else ():
        if not run.problem:
            folder = flags.runs / run.dataset / run.model / str(run.seed)
            append(flags.results, rows_of_run(folder / "run"))
    if failed := [run for run in found if run.problem]:
        raise UserError(f"{len(failed)} of {len(found)} runs failed; their train.log says why")
