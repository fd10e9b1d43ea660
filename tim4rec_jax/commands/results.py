"""Rows for a table of results: one for each run and protocol, all in one CSV file.

`rows_of_runs` evaluates finished runs with items of the history ranked and masked, and `append`
writes the rows. In a clone, `python -m benchmarks.results add RUN` and `tim4rec compare --results`
use both for `benchmarks/results.csv`.
"""

import csv
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from tim4rec_jax.data.splits import Split
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_write, read_json

METRICS = tuple(f"{name}@{k}" for k in (10, 20, 50) for name in ("hit", "ndcg", "mrr"))
# The columns that say how a ranking was made, see `tim4rec_jax.evaluation.protocol`. Figures of two
# rows can be compared only if these are the same in both.
PROTOCOL = ("split", "part", "order", "seen", "ties", "knows_next_time")
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
_NOT_NAMED = (
    *("dataset", "prepare", "preset", "seed", "data.placement"),
    *("train.checkpoint_minutes", "train.loggers"),
)


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


def means(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """For each figure that runs of consecutive seeds have, a row with the mean over the seeds.

    Figures have their standard deviation beside them. Costs are means too, and what the runs have
    in common, such as the command, is that of the last seed.
    """
    by_figure: dict[tuple[str, ...], dict[int, dict[str, str]]] = {}
    for row in rows:
        same = tuple(row[column] for column in KEY if column != "seed")
        by_figure.setdefault(same, {})[int(row["seed"])] = row
    found = []
    for runs in by_figure.values():
        first, last = min(runs), max(runs)
        if len(runs) == 1 or len(runs) <= last - first:
            continue
        ordered = [runs[seed] for seed in sorted(runs)]
        mean = ordered[-1] | {"seed": f"{first}-{last} (mean)", "p": "", "p_against": ""}
        mean["command"] = mean["command"].replace(f"seed={last}", "seed=SEED")
        for column in ("epochs", "best_epoch"):
            values = [row[column] for row in ordered]
            mean[column] = " ".join(values if len(set(values)) > 1 else values[:1])
        for column in (*METRICS, "train_cpu_s", "inference_cpu_s", "peak_mb"):
            values = [float(row[column]) for row in ordered if row[column]]
            if len(values) < len(ordered):
                mean[column] = ""  # and not the value of the last seed
                continue
            digits = 6 if column in METRICS else 2 if column == "inference_cpu_s" else 0
            mean[column] = f"{statistics.mean(values):.{digits}f}"
            if column in METRICS:
                mean[f"{column}_sd"] = f"{statistics.stdev(values):.6f}"
        found.append(mean)
    return found


def rows_of_runs(runs: Iterable[Path], against: Sequence[Path] = ()) -> list[dict[str, str]]:
    """`rows_of_run` of several runs and the `means` over their seeds, with p values.

    Args:
      runs: run directories.
      against: those of the runs that the others are compared with, user by user on NDCG@10 of the
        test. They differ in their seed alone, and have rows too. The p value of other runs that
        differ in their seed alone is in the row of their mean. Without `against` there is none.

    Raises:
      UserError: as `rows_of_run`, and where `against` are several models or another dataset.
    """
    by_run = {run: rows_of_run(run) for run in dict.fromkeys((*against, *runs))}
    rows = [row for found in by_run.values() for row in found]
    rows += means(rows)
    if against:
        _compare(rows, by_run, against)
    return rows


def _compare(
    rows: list[dict[str, str]], by_run: dict[Path, list[dict[str, str]]], against: Sequence[Path]
) -> None:
    """Writes `p` and `p_against` into the rows of the test."""
    from tim4rec_jax.evaluation.significance import paired_p_values

    groups: dict[str, list[Path]] = {}
    for run, (row, *_) in by_run.items():
        groups.setdefault(_trained(row), []).append(run)
    first, *others = groups
    if set(groups[first]) != set(against):
        raise UserError(f"--against must name all runs of one model and settings, as of {first}")
    told = by_run[against[0]][0]
    for run, (row, *_) in by_run.items():
        for column in ("dataset", *PROTOCOL):
            if row[column] != told[column]:
                raise UserError(
                    f"{run} has {column} {row[column]}, and {against[0]} has {told[column]}; "
                    "figures can be compared only if these are the same"
                )
    by_group = {name: [_gains(run) for run in found] for name, found in groups.items()}
    for seen in ("ranked", "masked"):
        p = paired_p_values(
            {
                name: np.mean([gains[seen] for gains in each], axis=0)
                for name, each in by_group.items()
            }
        )
        for row in rows:
            name, is_mean = _trained(row), row["seed"].endswith("(mean)")
            if name not in others or (row["part"], row["seen"]) != ("test", seen):
                continue
            if is_mean or len(groups[name]) == 1:
                row |= {"p": f"{p[name]:.6g}", "p_against": told["variant"] or told["model"]}


def _trained(row: dict[str, str]) -> str:
    """The model, the configuration and the settings of a row."""
    return " ".join(row[column] for column in ("model", "config", "variant", "settings"))


def _gains(workdir: Path) -> dict[str, np.ndarray]:
    """NDCG@10 of each user with a target in the test, [U], with the history ranked and masked."""
    from tim4rec_jax.data import open_dataset
    from tim4rec_jax.evaluation.evaluate import batch_settings, rank_targets
    from tim4rec_jax.evaluation.metrics import per_user, tested
    from tim4rec_jax.run import check_same_dataset, load_model

    config, model = load_model(workdir)
    data = config.data
    whole = open_dataset(config.dataset)
    check_same_dataset(whole.directory, whole.metadata, workdir)
    dataset = whole.split(data.split, data.valid_from, data.test_from)
    gains = {}
    for seen in ("ranked", "masked"):
        exclude = seen == "masked"
        found = rank_targets(model, dataset, "test", exclude_seen=exclude, **batch_settings(config))
        ranks, ties = tested(*found, config.eval.ties)
        gains[seen] = per_user(ranks, (10,), ties)["ndcg@10"]
    return gains


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def rows_of_run(workdir: Path) -> list[dict[str, str]]:
    """One row for each protocol of a finished run: validation ranked, test ranked and masked.

    The masked figures are computed, unless `eval.py --exclude-seen` has done so since the training
    ended. The rows also have what `tim4rec compare` keeps beside a run, such as its processor time.

    Args:
      workdir: the run directory.

    Raises:
      UserError: the run is missing, damaged or not finished, its dataset is not there, or its
        settings do not say which configuration they began with.
    """
    from tim4rec_jax.data import open_dataset
    from tim4rec_jax.evaluation.evaluate_run import evaluate_run
    from tim4rec_jax.evaluation.protocol import protocol
    from tim4rec_jax.run import check_same_dataset, read_figures, read_settings

    config, figures = read_settings(workdir / "config.json"), read_figures(workdir)
    dataset = open_dataset(config.dataset)
    check_same_dataset(dataset.directory, dataset.metadata, workdir)
    if not config.preset:
        raise UserError(
            f"{workdir / 'config.json'} does not say which configuration its settings began with; "
            'write it there, for example "preset": "beauty:causal"'
        )
    masked, trained = workdir / "eval_test_exclude_seen.json", workdir / "metrics.json"
    # Runs of earlier versions do not say so: all of them are optimistic.
    ties = figures.get("protocol", {}).get("ties", "optimistic")
    report = read_json(masked, dict, f"delete {masked}") if masked.exists() else {}
    earlier = masked.exists() and masked.stat().st_mtime < trained.stat().st_mtime
    fewer = not figures["test"].keys() <= report.get("metrics", {}).keys()  # of other --ks
    if earlier or fewer or report.get("protocol", {}).get("ties") != ties:
        report = evaluate_run(workdir, exclude_seen=True, ties=ties)
    settings = changed_settings(config)
    words = [f"python train.py --config configs/{config.preset.replace(':', '.py:', 1)}"]
    words[0] += "" if ":" in config.preset else ".py"
    words += [f"--config.{setting}" for setting in (*settings, f"seed={config.seed}")]
    row = dict.fromkeys(COLUMNS, "") | {
        "settings": " ".join(settings),
        "epochs": str(figures["epochs"]),
        "best_epoch": str(figures["best_epoch"]),
        "hardware": hardware(figures.get("device", "")),
        "jax": figures.get("jax", ""),
        "code": code(),
        "command": " ".join(words),
        "date": datetime.fromtimestamp(trained.stat().st_mtime, UTC).date().isoformat(),
    }
    if "processor_seconds" in figures:
        row["train_cpu_s"] = f"{figures['processor_seconds']:.0f}"
    row |= _costs(workdir.parent)
    rows = []
    results: list[tuple[Split, str, dict]] = [
        ("valid", "ranked", figures["valid"]),
        ("test", "ranked", figures["test"]),
        ("test", "masked", report["metrics"]),
    ]
    for part, seen, found in results:
        followed = protocol(config, dataset, part=part, exclude_seen=seen == "masked", ties=ties)
        followed["knows_next_time"] = "yes" if followed["knows_next_time"] else "no"
        rows.append(
            row
            | {name: str(value) for name, value in followed.items() if name in COLUMNS}
            | {metric: f"{found[metric]:.6f}" for metric in METRICS if metric in found}
        )
    return rows


def changed_settings(config) -> list[str]:
    """The settings of a run that differ from those of its configuration, as KEY=VALUE.

    Args:
      config: the settings of the run, resolved.

    Raises:
      UserError: there is no configuration of the name that the settings say.
    """
    from tim4rec_jax.presets import load_config

    ours, theirs = _comparable(config), _comparable(load_config(config.preset))
    changes = {name: value for name, value in ours.items() if theirs.get(name) != value}
    if "data.convention" in changes:  # it may follow from the other changes
        others = {name: value for name, value in changes.items() if name != "data.convention"}
        changed = load_config(config.preset)
        with changed.unlocked(), changed.ignore_type():
            changed.update_from_flattened_dict(others)
        if _comparable(changed)["data.convention"] == changes["data.convention"]:
            changes = others
    return sorted(f"{name}={value}" for name, value in changes.items())


def _comparable(config) -> dict[str, object]:
    from tim4rec_jax import config as config_lib

    values = json.loads(json.dumps(config_lib.flatten(config_lib.resolve(config))))
    named = (name for name in values if name not in _NOT_NAMED and not name.startswith("eval."))
    return {name: values[name] for name in named}


def _costs(folder: Path) -> dict[str, str]:
    """What `tim4rec compare` keeps in the folder of a run; nothing for a run of `train.py`.

    Its processor time counts the start of the program, too.
    """
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


def hardware(device: str) -> str:
    """This machine's cores and processor, and the device that a run names if it is another."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = f"{os.cpu_count()} cores {name}"
    return cores if device in ("", "cpu") else f"{device}, {cores}"


def code() -> str:
    """The version of the package, and the commit where it runs from a clone."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return f"{version('tim4rec-jax')} {commit}".strip()
