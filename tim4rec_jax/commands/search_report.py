"""What a search of settings says: lines and tables, and the best settings as a file."""

import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich import box
from rich.console import Console
from rich.table import Table

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.errors import one_line
from tim4rec_jax.files import atomic_write
from tim4rec_jax.training.log import duration

_MOST_ROWS = 15
_FEW = 8  # finished trials; with fewer, nothing can be said about importance


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial with the best figure, the first of several; None if there is none."""
    return max(_finished(study), key=_best_figure, default=None)


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _best_figure(trial: FrozenTrial) -> float:
    return max(trial.intermediate_values.values(), default=-math.inf)


def _best_epoch(trial: FrozenTrial) -> int:
    """The epoch whose parameters are kept: of equal figures, rounded, the last."""
    figures = trial.intermediate_values
    return max(figures, key=lambda epoch: (round(figures[epoch], 4), epoch))


def _figure(value: float) -> str:
    return f"{value:.4f}".replace("0.", ".", 1)


def _short_names(trial: FrozenTrial) -> dict[str, Any]:
    """The settings of a trial by the last word of their names, where only one has it."""
    last = [name.rpartition(".")[2] for name in trial.params]
    return {
        word if last.count(word) == 1 else name: value
        for word, (name, value) in zip(last, trial.params.items(), strict=True)
    }


def in_words(values: Mapping[str, Any]) -> str:
    """Settings in a line, by the last word of their names."""
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in values.items())


def print_plan(
    console: Console, ranges: Mapping[str, str], config: Config, trials: int, done: int
) -> None:
    """Prints what will be searched, and how."""
    width = max(map(len, ranges), default=0)
    epochs = f"{config.train.epochs} epoch{'s' * (config.train.epochs > 1)}"
    lines = [
        f"{trials} trial{'s' * (trials > 1)} of at most {epochs}, judged by NDCG@10 on validation"
        + (f"; {done} are done" if done else ""),
        *(f"  {name:<{width}}  {text}" for name, text in ranges.items()),
    ]
    console.out("\n".join(lines))


def print_start(console: Console, number: int, trials: int, values: Mapping[str, Any]) -> None:
    """Prints what a trial tries."""
    tried = in_words(values)
    text = f"trial {number + 1}/{trials}: {tried}"
    console.out(text)


def print_end(console: Console, study: optuna.Study) -> None:
    """Prints how the last trial has ended."""
    trial, best = study.get_trials(deepcopy=False)[-1], best_trial(study)
    if trial.state == TrialState.FAIL:
        text = f"failed: {one_line(trial.user_attrs['problem']).removeprefix('error: ')}"
    else:
        figures = trial.intermediate_values
        text = f"NDCG@10 {_figure(_best_figure(trial))} in epoch {_best_epoch(trial)}"
        stopped = trial.state == TrialState.PRUNED
        text += f", stopped after {max(figures)}" if stopped else f" of {max(figures)}"
        if math.isfinite(cost := trial.user_attrs["cpu"]):
            text += f", {duration(cost)} of processor time"
        text += " (best)" if best is not None and best.number == trial.number else ""
    console.out(f"  {text}")


def print_result(console: Console, study: optuna.Study, out: Path) -> None:
    """Prints the best trials, which settings mattered, and how to train with the best."""
    trials = study.get_trials(deepcopy=False)
    ranked = sorted(trials, key=lambda t: (t.state != TrialState.COMPLETE, -_best_figure(t)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # Names break at their underscores, so that the table fits a narrow terminal.
    for name in ("trial", "NDCG@10", "epochs", *_short_names(trials[0])):
        table.add_column(name.replace("_", " "), justify="right")
    for trial in ranked[:_MOST_ROWS]:
        note = {TrialState.PRUNED: "stopped ", TrialState.FAIL: "failed "}.get(trial.state, "")
        figures = trial.intermediate_values
        shown = _figure(_best_figure(trial)) if figures else ""
        epochs = f"{note}{max(figures, default=0)}"
        table.add_row(str(trial.number + 1), shown, epochs, *map(str, trial.params.values()))
    console.out("\nthe trials, the best first:")
    console.print(table)
    if len(ranked) > _MOST_ROWS:
        console.out(f"and {len(ranked) - _MOST_ROWS} more in {out / 'trials.csv'}")
    if len(_finished(study)) >= _FEW:
        parts = optuna.importance.get_param_importances(study).items()
        said = ", ".join(f"{name.rpartition('.')[2]} {part:.0%}" for name, part in parts)
        console.out(f"how much of the difference each explains: {said}")
    console.out(f"processor time: {duration(processor_seconds(study))}")
    if best_trial(study) is not None:
        console.out(f"train with the best: tim4rec train --config {out / 'best.py'} --workdir RUN")


def processor_seconds(study: optuna.Study) -> float:
    """Seconds of processor time of all trials; those of a trial without a process count nothing."""
    costs = [trial.user_attrs["cpu"] for trial in study.get_trials(deepcopy=False)]
    return math.fsum(cost for cost in costs if not math.isnan(cost))


def write_files(out: Path, words: list[str], config: Config, study: optuna.Study) -> None:
    """Writes `trials.csv`, and `best.py` if a trial has finished."""
    rows = [
        {
            "trial": trial.number + 1,
            "state": trial.state.name.lower(),
            "ndcg@10": _best_figure(trial) if trial.intermediate_values else "",
            "best epoch": _best_epoch(trial) if trial.intermediate_values else "",
            "epochs": max(trial.intermediate_values, default=0),
            "processor s": trial.user_attrs["cpu"],
            "peak MB": trial.user_attrs["memory"],
            **trial.params,
            "problem": trial.user_attrs["problem"],
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(out / "trials.csv", "w") as file:
        file.write(text.getvalue())
    if (best := best_trial(study)) is not None:
        with atomic_write(out / "best.py", "w") as file:
            file.write(best_config(words, config, best, len(rows)))


def best_config(words: list[str], config: Config, best: FrozenTrial, trials: int) -> str:
    """The settings of a trial as a configuration: a file of Python.

    Args:
      words: the command line that all trials share.
      config: the settings that it means.
      best: the trial.
      trials: how many trials there were.
    """
    named = re.sub("^--config=", "", next(w for w in words if w.startswith("--config=")))
    path, colon, variant = named.partition(":")
    if Path(path).is_file():  # which other folders do not know by this name
        named = f"{Path(path).absolute()}{colon}{variant}"
    settings = config_lib.flatten(config)
    given = {match[1] for word in words if (match := re.match(r"--config\.([\w.]+)=", word))}
    values = {name: settings[name] for name in sorted(given)} | best.params
    lines = "\n".join(f"    config.{name} = {value!r}" for name, value in values.items())
    return f'''"""{named}, with what `tim4rec tune` found best on validation.

NDCG@10 {_figure(_best_figure(best))} on validation, in trial {best.number + 1} of {trials}.
"""

from tim4rec_jax.presets import load_config


def get_config(variant=""):
    """The settings of the run."""
    config = load_config({named!r})
{lines}
    return config
'''
