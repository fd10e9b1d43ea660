"""The search of settings on trainings that are made up: its order, its end, what it refuses."""

import csv
import json
import math
import re

import pytest
from optuna.trial import TrialState
from rich.console import Console

from tests.data.small_dataset import random_histories, write_dataset
from tim4rec_jax.commands import search as search_lib
from tim4rec_jax.commands import search_report, trainings, tune
from tim4rec_jax.commands.search import Plan, ends, search, validations
from tim4rec_jax.commands.search_report import best_trial, print_result
from tim4rec_jax.config import flatten
from tim4rec_jax.errors import UserError, run_main
from tim4rec_jax.presets import load_config
from tim4rec_jax.run import write_settings

EPOCHS = 6
RANGES = {"train.learning_rate": "log:1e-4:1e-1", "model.hidden_size": "32,64,128"}


class Killed(BaseException):
    pass


class Trainings:
    """Stands for `trainings.train`: the figures follow from the settings."""

    def __init__(self):
        self.settings: list[tuple[float, int]] = []  # of each training that was started
        self.kill_after = math.inf  # epochs, over all trainings
        self.restarted = 0

    def __call__(self, folder, words, stop):
        run, values = (
            folder / "run",
            dict(re.findall(r"\.(\w+)=([\d.e-]+)$", "\n".join(words), re.M)),
        )
        self.restarted += run.exists()
        run.mkdir(parents=True, exist_ok=True)
        rate, width = float(values.get("learning_rate", 0.001)), int(values.get("hidden_size", 64))
        self.settings.append((rate, width))
        if rate > 0.02:
            return "error: the loss or its gradient was not finite at step 7 (epoch 1)"
        (folder / "cost.json").write_text('{"cpu": 60.0, "memory": 100.0}')
        peak = 0.2 - 0.03 * abs(math.log10(rate / 0.004)) + 0.0001 * width
        for epoch in range(len(validations(run)) + 1, EPOCHS + 1):
            figure = peak * (1 - 0.5**epoch)
            record = {"kind": "valid", "epoch": epoch, "ndcg@10": figure, "hit@10": figure}
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            self.kill_after -= 1
            if self.kill_after < 0:
                raise Killed
            if epoch % 2 == 0 and stop():  # asked now and then, not after every epoch
                return "error: interrupted"
        (run / "metrics.json").write_text('{"test": {"ndcg@10": 0.9}}')
        return ""


@pytest.fixture
def made_up(monkeypatch):
    standing_in = Trainings()
    monkeypatch.setattr(trainings, "train", standing_in)
    monkeypatch.setattr(search_lib.trainings, "check_same_dataset", lambda *_: None)
    return standing_in


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data"), random_histories([8] * 4))


def plan(dataset, out, trials=10, ranges=RANGES, **settings):
    settings = {"dataset": dataset, "train.epochs": EPOCHS} | settings
    words = [f"--config.{name}={value}" for name, value in settings.items()]
    return Plan(["--config=causal", *words], ranges, trials, out)


def outcome(study):
    return [
        (trial.params, trial.state, trial.value, trial.intermediate_values)
        for trial in study.get_trials()
    ]


@pytest.fixture(scope="module")
def calm(dataset, tmp_path_factory):
    """A search that nothing interrupts: its study, its folder, its trainings."""
    with pytest.MonkeyPatch.context() as patch:
        out, made_up = tmp_path_factory.mktemp("calm"), Trainings()
        patch.setattr(trainings, "train", made_up)
        return search(plan(dataset, out), Console(quiet=True)), out, made_up


def test_a_search_on_validation(calm, dataset, monkeypatch, capsys):
    study, out, made_up = calm
    trials = study.get_trials()
    assert made_up.settings == [
        (trial.params["train.learning_rate"], trial.params["model.hidden_size"]) for trial in trials
    ]
    # The configuration itself comes first.
    assert made_up.settings[0] == (0.001, 64)
    states = [trial.state for trial in trials]
    assert {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL} == set(states)
    for trial in trials:
        high = trial.params["train.learning_rate"] > 0.02
        assert (trial.state == TrialState.FAIL) == high
        assert ("not finite at step 7" in trial.user_attrs["problem"]) == high
    # Half of the trials before were better at the epoch that stopped a trial.
    stopped = states.index(TrialState.PRUNED)
    last = max(trials[stopped].intermediate_values)
    before = [
        trial.intermediate_values[last]
        for trial in trials[:stopped]
        if trial.state == TrialState.COMPLETE
    ]
    figures = sorted([*before, trials[stopped].intermediate_values[last]])
    assert figures.index(trials[stopped].intermediate_values[last]) < len(figures) / 2
    assert 1 <= last < EPOCHS

    best = max((t for t in trials if t.value is not None), key=lambda t: t.value)
    assert best_trial(study).number == best.number
    assert best.value > trials[0].value
    found = flatten(load_config(str(out / "best.py")))
    assert {name: found[name] for name in RANGES} == best.params
    assert (found["train.epochs"], found["dataset"]) == (EPOCHS, str(dataset))
    with open(out / "trials.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [state.name.lower() for state in states]
    assert float(rows[best.number]["ndcg@10"]) == best.value
    monkeypatch.setattr(search_report, "_FEW", 5)
    print_result(Console(width=80), study, out)
    shown = capsys.readouterr().out
    assert re.search(rf"^ *{best.number + 1} +{best.value:.4f}".replace("0.", "."), shown, re.M)
    assert "how much of the difference each explains: learning_rate" in shown
    assert f"tim4rec train --config {out}/best.py --workdir RUN" in shown


def test_a_search_that_is_killed_ends_like_one_that_is_not(calm, dataset, tmp_path, made_up):
    hit, said = plan(dataset, tmp_path / "hit"), Console(quiet=True)
    calm, started = outcome(calm[0]), len(calm[2].settings)
    for epochs in (9, 11):
        made_up.kill_after = epochs
        with pytest.raises(Killed):
            search(hit, said)
    made_up.kill_after = math.inf
    assert outcome(search(hit, said)) == calm
    assert made_up.restarted == 2
    assert len(made_up.settings) == started + 2
    longer = search(plan(dataset, tmp_path / "hit", 12), said)
    assert outcome(longer)[:10] == calm
    assert len(longer.get_trials()) == 12
    # Without the study, all trainings that ended are found again.
    before, expected = len(made_up.settings), outcome(longer)
    failed = sum(trial.state == TrialState.FAIL for trial in longer.get_trials())
    (tmp_path / "hit" / "study.db").unlink()
    assert outcome(search(plan(dataset, tmp_path / "hit", 12), said)) == expected
    assert len(made_up.settings) == before + failed


def test_another_search_in_the_same_folder_is_refused(dataset, tmp_path, made_up):
    said = Console(quiet=True)
    search(plan(dataset, tmp_path, 1), said)
    for other, says in (
        (plan(dataset, tmp_path, 2, **{"train.epochs": 9}), r"train.epochs \(6 -> 9\)"),
        (plan(dataset, tmp_path, 2, {"train.learning_rate": "0.1:1"}), "the range of model.hidden"),
        (plan(dataset, tmp_path, 2, {**RANGES, "train.batch_size": "1,2"}), "range of train.batch"),
    ):
        with pytest.raises(UserError, match=f"holds another search: .*{says}.*another --out"):
            search(other, said)
    data = tmp_path / "data"
    write_dataset(data, random_histories([8] * 4, seed=1))
    with pytest.raises(UserError, match="holds another search: the data; choose"):
        search(plan(data, tmp_path, 2), said)
    # Where the same data lies is free.
    write_dataset(data, random_histories([8] * 4))
    search(plan(data, tmp_path, 1), said)


def test_a_trial_folder_of_other_settings_is_refused(dataset, tmp_path, made_up):
    run = tmp_path / "trials" / "000" / "run"
    run.mkdir(parents=True)
    config = plan(dataset, tmp_path, **{"train.batch_size": 7}).config
    write_settings(config, run / "config.json")
    (run / "log.jsonl").touch()  # it has begun
    with pytest.raises(UserError, match=r"other settings: train.batch_size \(7 -> 32\)"):
        search(plan(dataset, tmp_path), Console(quiet=True))
    assert not made_up.settings


def test_a_configuration_that_fails_ends_the_search(dataset, tmp_path, made_up):
    ranges = {"train.batch_size": "16:64"}
    diverging = plan(dataset, tmp_path, 3, ranges, **{"train.learning_rate": 0.09})
    with pytest.raises(UserError, match=r"configuration itself fails, see .*train.log: the loss"):
        search(diverging, Console(quiet=True))
    assert len(made_up.settings) == 1


def test_settings_that_cannot_go_together_are_a_trial_that_failed(dataset, tmp_path, made_up):
    ranges = {"model.hidden_size": "64,33"}
    study = search(plan(dataset, tmp_path, 3, ranges), Console(quiet=True))
    problems = {t.params["model.hidden_size"]: t.user_attrs["problem"] for t in study.get_trials()}
    assert problems[64] == ""
    assert "head_dim" in problems[33]


def test_a_damaged_study(dataset, tmp_path, made_up):
    (tmp_path / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"study.db cannot be used \(.*not a database.*found again"):
        search(plan(dataset, tmp_path), Console(quiet=True))


def test_a_setting_is_searched_or_given(dataset, tmp_path):
    with pytest.raises(UserError, match=r"train\.learning_rate is searched, so --config"):
        plan(dataset, tmp_path, **{"train.learning_rate": 0.1})


def test_trials_are_compared_after_whole_epochs(dataset, tmp_path):
    with pytest.raises(UserError, match=r"epoch by epoch; leave config.eval.valid_steps out"):
        plan(dataset, tmp_path, **{"eval.valid_steps": 3})


@pytest.mark.parametrize(
    ("figures", "ended"),
    [
        ([0.1, 0.3, 0.2, 0.29], False),
        ([0.1, 0.3, 0.2, 0.29, 0.2], True),  # patience 2: the third epoch that is not as good
        ([0.2, 0.19996, 0.1, 0.19994], False),
        ([0.1] * 10, True),
    ],
)
def test_when_a_training_ends_by_itself(figures, ended):
    """As `test_early_stopping` of the training."""
    config = load_config("causal")
    config.train.update(epochs=10, patience=2)
    assert ends(dict(enumerate(figures, 1)), config.train) == ended


def test_a_torn_log(tmp_path):
    whole = '{"kind": "valid", "epoch": 1, "ndcg@10": 0.5}\n'
    (tmp_path / "log.jsonl").write_text(whole + '{"kind": "train"}\n5\n{"kind": "valid", "ep')
    assert validations(tmp_path) == {1: 0.5}
    assert validations(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--trials 0", "'0' is not a whole number from 1"),
        ("--trials -3", "'-3' is not a whole number"),
        ("--trials ²", "is not a whole number"),
        ("--trials 99999999999999999999", "is not a whole number from 1 to 10000"),
        ("--trials 3 --out=", "it is empty"),
        ("--trials 3 --set train.learning_rate", "is not of the form SETTING=RANGE"),
        ("--trials 3 --set a=1:2 a=1:3", "a is given twice"),
        ("--trials 3 --set a=1:2 --search x", "not allowed with argument"),
        ("--trials 3 --epochs 3", "unrecognized arguments: --epochs 3"),
        ("--trials 3 --config.seed", "'--config.seed' has no value"),
        ("--trials 3 --config.model.name=sasrec", "name the model as the variant"),
        ("", "--trials"),
    ],
)
def test_wrong_flags(words, says, capsys):
    assert run_main(lambda: tune.main(["--config=causal", *words.split()])) == 2
    assert says in capsys.readouterr().err


def test_the_command(dataset, tmp_path, made_up, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    words = ["--config=causal", f"--config.dataset={dataset}", "--config.train.epochs=6"]
    words += ["--trials=2"]
    tune.main(words)
    shown = capsys.readouterr().out
    assert "2 trials of at most 6 epochs" in shown
    assert "trial 2/2: learning_rate" in shown
    assert (tmp_path / "runs" / "tune-causal" / "best.py").exists()
    with pytest.raises(UserError, match="popularity learns nothing"):
        tune.main(["--config=popularity", f"--config.dataset={dataset}", "--trials=2"])
    made_up.kill_after = 1

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainings, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.main([*words[:-1], "--trials=3"])
    assert "the study is kept: run the same command to go on" in capsys.readouterr().out
