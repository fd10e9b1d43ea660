"""The search of settings: trials one after the other, each a training, judged on validation.

    OUT/study.db       the trials that have ended, an Optuna study in SQLite
    OUT/trials/007/    a trial: its run directory `run/`, `train.log` and `cost.json`
    OUT/trials.csv     all trials as a table
    OUT/best.py        the best settings so far, a configuration for `train.py`

What a trial tries follows from the seed, its number and the trials before. It enters the study when
it has ended. One that was cut short is therefore tried again with the same settings, and its
training goes on where it stopped.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from tim4rec_jax.cli import prepare_data
from tim4rec_jax.commands import search_report as report
from tim4rec_jax.commands import trainings
from tim4rec_jax.commands.search_space import Space, make_space
from tim4rec_jax.config import Config, flatten
from tim4rec_jax.data.format import read_metadata
from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.run import CHANGE_NOTHING, only_process, read_validations

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A search.

    Attributes:
      words: the command line of `train.py` that all trials share, without `--workdir`.
      ranges: what to try, as the user wrote it, see `search_space.make_space`.
      trials: how many trials there shall be, those of earlier starts included.
      out: the folder of the search.
      config: the settings of `words`, resolved.
      space: the ranges as Optuna knows them.
    """

    words: list[str]
    ranges: Mapping[str, str]
    trials: int
    out: Path
    config: Config = dataclasses.field(init=False)
    space: Space = dataclasses.field(init=False)

    def __post_init__(self):
        config = trainings.settings(self.words)
        for name in self.ranges:
            if any(word.startswith(f"--config.{name}=") for word in self.words):
                raise UserError(f"{name} is searched, so --config.{name} has no effect; drop one")
        if config.eval.valid_steps is not None:
            raise UserError(
                "a search compares trainings epoch by epoch; leave config.eval.valid_steps out"
            )
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "space", make_space(self.ranges, config))


def search(plan: Plan, console: Console) -> optuna.Study:
    """Searches settings, or goes on with the search that `plan.out` holds.

    The first trial has the settings of the configuration, as far as the ranges hold them. A trial
    that falls behind the median of those before is stopped. One that fails is recorded with its
    reason. Only if the configuration itself fails, the search ends.

    Args:
      plan: what to search.
      console: where each trial is told.

    Returns:
      The study. All of its trials have ended.

    Raises:
      UserError: `plan.out` holds another search or is damaged, or the configuration itself fails.
      KeyboardInterrupt: Ctrl-C; the study is kept.
    """
    prepare_data(plan.config)
    plan.out.mkdir(parents=True, exist_ok=True)
    with only_process(plan.out), _one_sentence(plan.out / "study.db"):
        study = _open(plan)
        done = len(study.get_trials(deepcopy=False))
        report.print_plan(console, plan.ranges, plan.config, plan.trials, done)
        for number in range(done, plan.trials):
            trial = _Trial(plan, study, number)
            report.print_start(console, number, plan.trials, trial.values)
            study.add_trial(trial.run())
            report.print_end(console, study)
            report.write_files(plan.out, plan.words, plan.config, study)
    return study


def validations(run: Path) -> dict[int, float]:
    """NDCG@10 on validation by epoch, as the log of a run has it."""
    done = (each for each in read_validations(run) if "ndcg@10" in each)
    return {int(each["epoch"]): float(each["ndcg@10"]) for each in done}


def ends(figures: Mapping[int, float], train: Any) -> bool:
    """Whether a training ends by itself after these epochs, as `training.train` decides.

    Args:
      figures: NDCG@10 by epoch, in order.
      train: the section `train` of its settings.
    """
    best, stale = -math.inf, 0
    for figure in figures.values():
        better = round(figure, 4) >= best
        best, stale = (round(figure, 4), 0) if better else (best, stale + 1)
    return max(figures) >= train.epochs or stale > train.patience


class _Trial:
    """One trial.

    Attributes:
      values: the settings that it tries, by their full names.
    """

    def __init__(self, plan: Plan, study: optuna.Study, number: int):
        self.values, self._as_configured = _suggest(study, plan, number)
        self._plan, self._study = plan, study
        self._folder = plan.out / "trials" / f"{number:03}"
        self._figures: dict[int, float] = {}  # by epoch
        self._behind = False
        self._pruner = optuna.pruners.MedianPruner(
            n_startup_trials=5, n_warmup_steps=min(plan.config.train.epochs // 5, 5), n_min_trials=3
        )

    def run(self) -> FrozenTrial:
        """Trains to the end, or until the trial falls behind; returns it as the study keeps it.

        Raises:
          UserError: the folder of the trial holds another run, or the configuration itself fails.
        """
        words = [*self._plan.words, *(f"--config.{n}={v}" for n, v in self.values.items())]
        try:
            self._settings = trainings.settings(words)
        except UserError as error:  # these values cannot go together
            return self._ended(TrialState.FAIL, str(error))
        problem = ""
        finished = trainings.finished(self._folder / "run", self._settings)
        if not self._falls_behind() and not finished:
            problem = trainings.train(self._folder, words, self._falls_behind)
        if self._falls_behind():
            return self._ended(TrialState.PRUNED)
        if not problem and not self._figures:
            problem = f"{self._folder}/run/log.jsonl has no figures"
        if problem and self._as_configured:
            raise UserError(
                f"the configuration itself fails, see {self._folder}/train.log: "
                f"{problem.removeprefix('error: ')}"
            )
        return self._ended(TrialState.FAIL if problem else TrialState.COMPLETE, problem)

    def _falls_behind(self) -> bool:
        """Whether the trial was worse than the median of those before after some epoch.

        Epochs are judged one by one, and none after the one that decides, so that it does not
        matter how often this is called. The last epoch of a training stops nothing.
        """
        for epoch, figure in sorted(validations(self._folder / "run").items()):
            if self._behind or epoch <= max(self._figures, default=0):
                continue
            self._figures[epoch] = figure
            now = self._ended(TrialState.RUNNING)
            last = ends(self._figures, self._settings.train)
            self._behind = not last and bool(self._pruner.prune(self._study, now))
        return self._behind

    def _ended(self, state: TrialState, problem: str = "") -> FrozenTrial:
        return create_trial(
            state=state,
            value=max(self._figures.values()) if state == TrialState.COMPLETE else None,
            params=self.values,
            distributions=self._plan.space,
            intermediate_values=dict(self._figures),
            user_attrs={"problem": problem, **trainings.cost(self._folder)},
        )


def _suggest(study: optuna.Study, plan: Plan, number: int) -> tuple[dict[str, Any], bool]:
    """The settings of a trial, and whether they are all those of the configuration."""
    seed = np.random.SeedSequence([plan.config.seed, number]).generate_state(1)
    sampler = optuna.samplers.TPESampler(seed=int(seed[0]))
    memory = optuna.create_study(direction="maximize", sampler=sampler)
    memory.add_trials(study.get_trials(deepcopy=False))
    values = {
        name: _short(value, plan.space[name])
        for name, value in memory.ask(plan.space).params.items()
    }
    configured = flatten(plan.config)
    if number == 0:
        own = {n: configured[n] for n in values if _holds(plan.space[n], configured[n])}
        values |= own
    as_configured = number == 0 and all(values[name] == configured[name] for name in values)
    return values, as_configured


def _short(value: Any, distribution: Any) -> Any:
    """A number with three digits, as fits a table and a command line; others stay as they are."""
    if not isinstance(value, float) or isinstance(distribution, CategoricalDistribution):
        return value
    return min(max(float(f"{value:.3g}"), distribution.low), distribution.high)


def _holds(distribution: Any, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return value is not None and distribution.low <= value <= distribution.high


def _open(plan: Plan) -> optuna.Study:
    """Opens the study of a folder, or begins it.

    Raises:
      UserError: it is another search; the message says what tells them apart.
    """
    # Without a pool, no connection stays open that nobody would close.
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{(plan.out / 'study.db').absolute()}", engine_kwargs={"poolclass": NullPool}
    )
    study = optuna.create_study(
        storage=storage,
        study_name="tim4rec",
        direction="maximize",
        load_if_exists=True,
    )
    content = read_metadata(Path(plan.config.dataset)).get("content", {})
    settings = {
        n: v for n, v in flatten(plan.config).items() if n not in {*CHANGE_NOTHING, *plan.ranges}
    }
    ranges = {f"the range of {name}": text for name, text in plan.ranges.items()}
    # Through JSON, which makes lists of tuples.
    ours = json.loads(json.dumps(settings | ranges | {"the data": content}))
    theirs = study.user_attrs.get("search")
    if theirs is None:
        study.set_user_attr("search", theirs := ours)
    changed = [
        name if name == "the data" else f"{name} ({theirs.get(name)} -> {ours.get(name)})"
        for name in sorted(theirs | ours)
        if theirs.get(name) != ours.get(name) and name not in CHANGE_NOTHING
    ]
    if changed:
        raise UserError(
            f"{plan.out} holds another search: {', '.join(changed)}; choose another --out, or "
            "delete that folder to start anew"
        )
    return study


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Names the file when SQLite cannot read or write it."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__
        reason = first_line(cause if isinstance(cause, Exception) else error)
        raise UserError(
            f"{path} cannot be used ({reason}); make room on the "
            "disk, or move the file away: the trainings of its trials are found again"
        ) from error
