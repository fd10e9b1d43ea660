"""Rows for a table of results: one for each run and protocol, all in one CSV file.

`rows_of_run` evaluates a finished run with items of the history ranked and masked, and `append`
writes the rows. In a clone, `python -m benchmarks.results add RUN` and `tim4rec compare --results`
use both for `benchmarks/results.csv`.
"""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_write, read_json

METRICS = tuple(f"{name}@{k}" for k in (10, 20, 50) for name in ("hit", "ndcg", "mrr"))
# The columns that say how a ranking was made. Figures of two rows can be compared only if these
# are the same in both.
PROTOCOL = ("split", "order", "seen", "ties", "knows_next_time")
# What names a figure. A new row replaces the row that has the same values here.
KEY = ("dataset", "config", "variant", "settings", "model", "seed", *PROTOCOL, "note")
COLUMNS = (
    *("dataset", "config", "variant", "settings", "model", "seed", *PROTOCOL),
    *METRICS,
    *(f"{metric}_sd" for metric in METRICS),  # over seeds, where a row is the mean of several
    *("p", "p_against"),  # paired t-test over users on NDCG@10, Holm's correction
    *("epochs", "best_epoch", "train_cpu_s", "inference_cpu_s", "peak_mb", "parameters", "mflop"),
    *("hardware", "jax", "code", "command", "date", "note"),
)
# Settings that change no figure, or have a column of their own.
_NOT_NAMED = ("dataset", "prepare", "seed", "eval.batch_size", "data.placement")
_NOT_NAMED += ("train.checkpoint_minutes",)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table of results.

    Raises:
      UserError: the file is missing, or its columns are others than `COLUMNS`.
    """
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(f"{path} is no table of results: its columns should be {','.join(COLUMNS)}")
    return rows


def append(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Adds rows to a table of results, which is made if it is missing.

    A row replaces the one in the table that has the same `KEY`, because it is the same figure
    measured again.

    Raises:
      UserError: the file is there and holds something else, or cannot be written.
    """
    kept = {_key(row): row for row in (read(path) if path.exists() else [])}
    kept |= {_key(row): row for row in rows}
    with atomic_write(path, "w") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def rows_of_run(workdir: Path) -> list[dict[str, str]]:
    """One row for each protocol of a finished run: validation ranked, test ranked and masked.

    The masked figures are computed, unless `eval.py --exclude-seen` has done so since the training
    ended. The rows also have what `tim4rec compare` keeps beside a run, such as its processor time.

    Args:
      workdir: the run directory.

    Raises:
      UserError: the run is missing, damaged or not finished, or its dataset is not there.
    """
    from tim4rec_jax.evaluation.evaluate import evaluate_run
    from tim4rec_jax.run import DATASET_FILE, read_figures, read_settings

    config, figures = read_settings(workdir / "config.json"), read_figures(workdir)
    masked, trained = workdir / "eval_test_exclude_seen.json", workdir / "metrics.json"
    if not masked.exists() or masked.stat().st_mtime < trained.stat().st_mtime:
        evaluate_run(workdir, exclude_seen=True)
    name, variant, changes = experiment(config)
    words = [f"python train.py --config configs/{name}.py:{variant}".removesuffix(":")]
    words += [f"--config.{change}" for change in (*changes, f"seed={config.seed}")]
    remedy = f"train {workdir} anew"
    dataset = read_json(workdir / DATASET_FILE, dict, remedy)
    row = dict.fromkeys(COLUMNS, "") | {
        "dataset": dataset["name"],
        "config": name,
        "variant": variant,
        "settings": " ".join(changes),
        "model": config.model.name,
        "seed": str(config.seed),
        "order": dataset["order"],
        "ties": "optimistic",
        "knows_next_time": "yes" if config.model.get("knows_next_time") else "no",
        "epochs": str(figures["epochs"]),
        "best_epoch": str(figures["best_epoch"]),
        "hardware": f"{_processor()}, {os.cpu_count()} cores, {figures.get('device', '')}",
        "jax": figures.get("jax", ""),
        "code": _code(),
        "command": " ".join(words),
        "date": datetime.fromtimestamp(trained.stat().st_mtime, UTC).date().isoformat(),
    }
    row |= _costs(workdir.parent)
    found = [
        ("valid", "ranked", figures["valid"]),
        ("test", "ranked", figures["test"]),
        ("test", "masked", read_json(masked, dict, remedy)["metrics"]),
    ]
    return [
        row
        | {"split": f"{config.data.split}/{split}", "seen": seen}
        | {metric: f"{values[metric]:.6f}" for metric in METRICS if metric in values}
        for split, seen, values in found
    ]


def experiment(config) -> tuple[str, str, list[str]]:
    """The configuration by name that settings are nearest to.

    Args:
      config: the settings of a run, resolved.

    Returns:
      The name of the configuration, its variant, and the settings that differ from it, as
      KEY=VALUE.
    """
    from tim4rec_jax.presets import OWN, load_config, names

    ours = _comparable(config)
    known = [(name, variant) for name in names() for variant in _variants(name)]
    prepared = [each for each in known if load_config(":".join(each)).prepare == config.prepare]
    found = []
    for name, variant in prepared or [each for each in known if each[0] == OWN]:
        loaded = load_config(f"{name}:{variant}".removesuffix(":"))
        if loaded.model.name == config.model.name:
            changes = {k: v for k, v in ours.items() if _comparable(loaded).get(k) != v}
            found.append((name, variant, _without_implied(loaded, changes)))
    name, variant, changes = min(found, key=lambda each: len(each[2]))
    return name, variant, [f"{key}={value}" for key, value in changes.items()]


def _variants(name: str) -> Iterator[str]:
    """The variants that a configuration knows."""
    from tim4rec_jax.presets import baselines, load_config

    for variant in ("", "causal", "official", *baselines()):
        try:
            load_config(f"{name}:{variant}".removesuffix(":"))
        except UserError:
            continue
        yield variant


def _comparable(config) -> dict[str, object]:
    from tim4rec_jax import config as config_lib

    values = json.loads(json.dumps(config_lib.flatten(config_lib.resolve(config))))
    return {name: value for name, value in values.items() if name not in _NOT_NAMED}


def _without_implied(loaded, changes: dict[str, object]) -> dict[str, object]:
    """Leaves out the convention of gaps where it follows from the other changes."""
    others = {name: value for name, value in changes.items() if name != "data.convention"}
    with loaded.unlocked(), loaded.ignore_type():
        loaded.update_from_flattened_dict(others)
    implied = _comparable(loaded)["data.convention"] == changes.get("data.convention")
    return others if implied else changes


def _costs(folder: Path) -> dict[str, str]:
    """What `tim4rec compare` keeps in the folder of a run; nothing for a run of `train.py`."""
    remedy = "delete it and compare again"
    costs = {}
    if (folder / "cost.json").exists():
        cost = read_json(folder / "cost.json", dict, remedy)
        costs |= {"train_cpu_s": f"{cost['cpu']:.0f}", "peak_mb": f"{cost['memory']:.0f}"}
    if (folder / "measured.json").exists():
        measured = read_json(folder / "measured.json", dict, remedy)
        costs |= {
            "inference_cpu_s": f"{measured['inference']:.2f}",
            "parameters": str(measured["parameters"]),
            "mflop": f"{measured['flops'] / 1e6:.1f}",
        }
    return costs


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _code() -> str:
    """The version of the package, and the commit where it runs from a clone."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return f"{version('tim4rec-jax')} {commit}".strip()
