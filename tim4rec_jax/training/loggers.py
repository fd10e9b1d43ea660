"""Where the figures of a training go besides `log.jsonl`: TensorBoard, MLflow, a logger of yours.

`config.train.loggers` names them, and `tim4rec_jax.fit(..., loggers=[...])` takes objects.
"""

import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tensorboardX

from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import atomic_write
from tim4rec_jax.models import imported


@runtime_checkable
class Logger(Protocol):
    """What a logger does. What it raises ends neither the training nor the other loggers.

    A figure has a name such as "train/loss" or "valid/ndcg@10". Steps are counted from the
    beginning of the run, over all its starts.
    """

    def start(self, settings: Mapping[str, Any], workdir: Path, step: int) -> None:
        """Is called once before the training, and again each time the run is resumed.

        Args:
          settings: of the run, by their full names: `{"train.epochs": 30, ...}`.
          workdir: the run directory.
          step: number of steps done. Figures of later steps were lost, and will come again.
        """
        ...

    def log(self, metrics: Mapping[str, int | float], step: int) -> None:
        """Takes figures that belong to a step."""
        ...

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Is called at the end with what `metrics.json` holds, or None if the training stopped."""
        ...


class TensorBoard:
    """Event files in `tensorboard/` of the run directory."""

    def start(self, settings: Mapping[str, Any], workdir: Path, step: int) -> None:
        """See `Logger`."""
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def log(self, metrics: Mapping[str, int | float], step: int) -> None:
        """See `Logger`."""
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """See `Logger`."""
        self._board.close()


class MLflow:
    """A run of MLflow; needs `pip install 'tim4rec-jax[mlflow]'`.

    `MLFLOW_TRACKING_URI` names the server or the database (MLflow's default is
    `sqlite:///mlflow.db` in the current folder), and `MLFLOW_EXPERIMENT_NAME` the experiment
    (default: "tim4rec"). The file `mlflow_run` of the run directory holds the run's id, with which
    a resumed training goes on in the same run. MLflow allows no "@" in names, so that "ndcg@10" is
    called "ndcg_at_10" there.

    Raises:
      UserError: MLflow is not installed.
    """

    def __init__(self):
        # MLflow by itself asks a server that is away for four minutes, and the training waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            self._mlflow: Any = importlib.import_module("mlflow")
        except ImportError as error:
            raise UserError(
                "config.train.loggers names mlflow, which is not installed; "
                "pip install 'tim4rec-jax[mlflow]'"
            ) from error

    def start(self, settings: Mapping[str, Any], workdir: Path, step: int) -> None:
        """See `Logger`."""
        self._client, id_file = self._mlflow.MlflowClient(), workdir / "mlflow_run"
        # The last step of each figure that the run has already.
        self._logged: dict[str, int] = {}
        if id_file.exists():
            self._run = id_file.read_text().strip()
            for name in self._client.get_run(self._run).data.metrics:
                history = self._client.get_metric_history(self._run, name)
                self._logged[name] = max(entry.step for entry in history)
            self._client.update_run(self._run, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "tim4rec")
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        run = self._client.create_run(place, run_name=str(workdir))
        self._run = run.info.run_id
        entities = self._mlflow.entities
        texts = [entities.Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(self._run, params=texts)
        with atomic_write(id_file, "w") as file:
            file.write(self._run + "\n")

    def log(self, metrics: Mapping[str, int | float], step: int) -> None:
        """See `Logger`."""
        named = {name.replace("@", "_at_"): float(value) for name, value in metrics.items()}
        now = time.time_ns() // 1_000_000
        # Work that is done again gives the same figures again.
        new = [name for name in named if step > self._logged.get(name, -1)]
        batch = [self._mlflow.entities.Metric(name, named[name], now, step) for name in new]
        if batch:
            self._client.log_batch(self._run, metrics=batch)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """See `Logger`."""
        self._client.set_terminated(self._run, "KILLED" if result is None else "FINISHED")


LOGGERS = {"tensorboard": TensorBoard, "mlflow": MLflow}


def make_loggers(names: str) -> list[Logger]:
    """The loggers that `config.train.loggers` names.

    Args:
      names: keys of `LOGGERS`, or classes of your own as "module:Class", with commas between.

    Raises:
      UserError: there is no such logger, it cannot be made, or a package that it needs is not
        installed.
    """
    loggers = []
    for name in filter(None, names.split(",")):
        try:
            loggers.append(checked_logger((LOGGERS.get(name) or imported(name))()))
        except UserError:
            raise
        # The class belongs to the user, who can correct whatever it raises.
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{name} cannot be made: "
            raise UserError(f"config.train.loggers {kind}{first_line(error)}") from error
    return loggers


def checked_logger(logger: Any) -> Logger:
    """Makes sure that an object is a logger.

    Raises:
      UserError: it lacks a method.
    """
    if not isinstance(logger, Logger) or isinstance(logger, type):
        raise UserError(
            f"{logger!r} is no logger: it must be an object with the methods start, log and finish"
        )
    return logger
