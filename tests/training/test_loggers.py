"""Loggers: what they are told and when, and that none can end a training."""

import sys
from types import SimpleNamespace

import pytest

from tests.training.tiny_run import Recorder
from tim4rec_jax import config as config_lib
from tim4rec_jax.errors import UserError
from tim4rec_jax.training.log import RunLog
from tim4rec_jax.training.loggers import LOGGERS, MLflow, checked_logger, make_loggers


class Failing(Recorder):
    def log(self, metrics, step):
        raise ConnectionError("the server is\naway")


class Unmade(Recorder):
    def __init__(self):
        raise KeyError("token")


def test_a_logger_that_raises_is_left_out_with_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Recorder, "calls", [])
    log = RunLog(tmp_path, 0, [Failing(), Recorder()])
    for step in (1, 2):
        log.write("valid", step, epoch=step, note="a text is no figure")
    log.close()
    assert capsys.readouterr().err == (
        "warning: the logger Failing failed (the server is); the training goes on without it\n"
    )
    told = [("log", {"valid/epoch": step}, step) for step in (1, 2)]
    assert Recorder.calls[2:] == [*told, ("finish", None)]  # after two starts
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 2


def test_names_of_loggers():
    assert set(LOGGERS) == set(config_lib.LOGGERS)
    found = make_loggers(f"tensorboard,{Recorder.__module__}:Recorder")
    assert [type(logger).__name__ for logger in found] == ["TensorBoard", "Recorder"]
    assert make_loggers("") == []
    setting = config_lib.SETTINGS["train.loggers"]
    with pytest.raises(ValueError, match="'mlflo'; it must name tensorboard or mlflow or a class"):
        setting.checked("mlflo")
    for name, says in (
        ("os:Nothing", "loggers is 'os:Nothing', which cannot be imported"),
        ("os:getcwd", "is no logger: it must be an object with the methods start, log and finish"),
        (f"{__name__}:Unmade", "loggers .*:Unmade cannot be made: 'token'"),
    ):
        with pytest.raises(UserError, match=says):
            make_loggers(name)
    with pytest.raises(UserError, match="is no logger"):
        checked_logger(Recorder)


class Store:
    """The part of MLflow that the logger uses, with its rules, in memory."""

    def __init__(self):
        self.runs: dict[str, SimpleNamespace] = {}
        self.experiments: dict[str, str] = {}
        self.entities = SimpleNamespace(
            Param=lambda key, value: SimpleNamespace(key=key, value=value),
            Metric=lambda key, value, timestamp, step: SimpleNamespace(
                key=key, value=value, step=step
            ),
        )

    def MlflowClient(self):
        return self

    def create_experiment(self, name):
        assert name not in self.experiments
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def get_experiment_by_name(self, name):
        known = self.experiments.get(name)
        return known and SimpleNamespace(experiment_id=known)

    def create_run(self, experiment, run_name):
        run = SimpleNamespace(name=run_name, params={}, history=[], status="RUNNING")
        self.runs[str(len(self.runs))] = run
        return SimpleNamespace(info=SimpleNamespace(run_id=str(len(self.runs) - 1)))

    def get_run(self, run):
        metrics = {metric.key: metric.value for metric in self.runs[run].history}
        return SimpleNamespace(data=SimpleNamespace(metrics=metrics))

    def get_metric_history(self, run, name):
        return [metric for metric in self.runs[run].history if metric.key == name]

    def log_batch(self, run, metrics=(), params=()):
        assert not any("@" in metric.key for metric in metrics)
        self.runs[run].history += metrics
        self.runs[run].params |= {param.key: param.value for param in params}

    def update_run(self, run, status):
        self.runs[run].status = status

    set_terminated = update_run


def logged(workdir):
    """Logs two epochs, stops, does the second again and ends."""
    for first, last, result in ((1, 2, None), (2, 3, {"test": {}})):
        log = RunLog(workdir, first - 1, [MLflow()], {"train.epochs": 3, "seed": 2020})
        for step in range(first, last + 1):
            log.write("valid", step, **{"ndcg@10": step / 10})
        log.result = result
        log.close()


def test_a_resumed_run_goes_on_in_the_same_run_of_mlflow(tmp_path, monkeypatch, capsys):
    store = Store()
    monkeypatch.setitem(sys.modules, "mlflow", store)
    logged(tmp_path)
    (run,) = store.runs.values()
    assert run.params == {"train.epochs": "3", "seed": "2020"}
    assert [(m.key, m.value, m.step) for m in run.history] == [
        ("valid/ndcg_at_10", step / 10, step) for step in (1, 2, 3)
    ]
    assert (run.status, run.name, store.experiments) == (
        "FINISHED",
        str(tmp_path),
        {"tim4rec": "0"},
    )
    RunLog(tmp_path / "..", 0, [MLflow()]).close()  # another run of the same experiment
    assert [run.status for run in store.runs.values()] == ["FINISHED", "KILLED"]
    assert not capsys.readouterr().err


def test_without_mlflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'tim4rec-jax\[mlflow\]'"):
        make_loggers("mlflow")


# MLflow takes seconds to begin. The fast twin has the same rules in memory.
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # its own, about what it uses
def test_a_real_store_of_mlflow(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shop")
    mlflow = pytest.importorskip("mlflow", reason="pip install 'tim4rec-jax[mlflow]'")
    logged(tmp_path)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"train.epochs": "3", "seed": "2020"}
    history = client.get_metric_history(run.info.run_id, "valid/ndcg_at_10")
    assert [(entry.step, entry.value) for entry in history] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert "warning: the logger" not in capsys.readouterr().err

    # A server that is away.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    log = RunLog(tmp_path / "..", 0, [MLflow()])
    log.write("valid", 1, loss=2.0)
    log.close()
    assert capsys.readouterr().err.count("warning: the logger MLflow failed (") == 1
