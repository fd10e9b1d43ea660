"""Every mistake on the command line of `train.py`, as a user meets it: one sentence."""

import dataclasses
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tim4rec_jax import config as config_lib
from tim4rec_jax.cli import parse
from tim4rec_jax.data_prep import sources
from tim4rec_jax.errors import UserError
from tim4rec_jax.run import write_settings
from tim4rec_jax.training import dispatch

ROOT = Path(__file__).parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'ml1m.py'}"
WORKDIR = "--workdir=runs/x"


def parsed(*flags):
    return parse(["train.py", *flags], usage="how to")


def test_file_variant_and_overrides():
    config, workdir = parsed(
        f"{CONFIG}:256d",
        "--config.train.learning_rate=1e-2",
        "--config.data.buckets=(20,200)",
        "--config.model.is_ffn=false",
        "--config.data.convention=exact",
        WORKDIR,
    )
    assert workdir == Path("runs/x")
    assert (config.model.hidden_size, config.train.learning_rate) == (256, 0.01)
    assert (config.data.buckets, config.model.is_ffn) == ((20, 200), False)
    assert config.data.convention == "exact"
    with pytest.raises(AttributeError):  # locked
        config.model.hiden_size = 3


def test_flags_and_values_apart():
    config, workdir = parsed("--config", CONFIG.partition("=")[2], "--workdir", "there")
    assert (config.model.hidden_size, workdir) == (64, Path("there"))


@pytest.mark.parametrize(
    ("flags", "workdir"),
    [
        ([CONFIG], "runs/ml1m"),
        ([f"{CONFIG}:256d-official"], "runs/ml1m-256d-official"),
        ([f"{CONFIG}:sasrec", "--config.seed=7"], "runs/ml1m-sasrec-seed7"),
        ([CONFIG, "--config.seed=2020", "--config.train.epochs=3"], "runs/ml1m"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_run_directory_by_default(flags, workdir):
    assert parsed(*flags)[1] == Path(workdir)


def test_older_names_of_settings(tmp_path, capsys):
    config, _ = parsed(CONFIG, "--config.train.loss=cross_entropy", "--config.model.seen_offset=1")
    assert config.model.repeat_bias
    assert capsys.readouterr().err == (
        "note: config.model.seen_offset is now called config.model.repeat_bias\n"
    )
    config, _ = parsed(CONFIG, "--config.model.drift_knots", "4")
    assert config.model.date_bias_knots == 4
    capsys.readouterr()
    path = tmp_path / "mine.py"
    path.write_text(
        "from tim4rec_jax.config import default\n"
        "def get_config(variant):\n"
        "    config = default()\n"
        "    config.model.drift_knots = 5\n"
        "    return config\n"
    )
    assert parsed(f"--config={path}")[0].model.date_bias_knots == 5
    assert capsys.readouterr().err == (
        f"note: {path}: config.model.drift_knots is now called config.model.date_bias_knots\n"
    )


def test_another_model_by_name():
    config, _ = parsed(CONFIG, "--config.model.name=sasrec", "--config.model.n_heads=4")
    assert (config.model.name, config.model.n_heads, config.train.patience) == ("sasrec", 4, 10)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--config FILE.py is missing"),
        ([WORKDIR], "--config FILE.py is missing"),
        ([CONFIG, "--workdir="], "--workdir is empty"),
        (["--config=no/such.py", WORKDIR], "there is no file no/such.py"),
        (["--config=configs", WORKDIR], "there is no file configs"),
        ([f"{CONFIG}:512d", WORKDIR], "'512d' is not a variant; there are: causal, 256d, official"),
        ([CONFIG, WORKDIR, "--epochs=3"], "epochs"),
        ([CONFIG, WORKDIR, "--wokdir=x"], "wokdir"),
        ([CONFIG, WORKDIR, "resume"], "'resume' is not a flag"),
        (
            [CONFIG, WORKDIR, "--config.model.hiden_size=3"],
            "config.model.hiden_size is not a setting; nearest: model.hidden_size",
        ),
        (
            [CONFIG, WORKDIR, "--config.learning_rate=3"],
            "config.learning_rate is not a setting; nearest: train.learning_rate",
        ),
        ([CONFIG, WORKDIR, "--config.xyzzy", "3"], "config.xyzzy is not a setting"),
        ([CONFIG, WORKDIR, "--config.model=3"], "config.model"),
        ([CONFIG, WORKDIR, "--config.train.epochs=ten"], "config.train.epochs"),
        ([CONFIG, WORKDIR, "--config.train.epochs=2.5"], "config.train.epochs"),
        ([CONFIG, WORKDIR, "--config.train.learning_rate=fast"], "config.train.learning_rate"),
        ([CONFIG, WORKDIR, "--config.model.is_time=perhaps"], "config.model.is_time"),
        ([CONFIG, WORKDIR, "--config.data.buckets=(1,"], "config.data.buckets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(flags, words):
    with pytest.raises(UserError) as error:
        parsed(*flags)
    message = str(error.value)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(variant):\n    return 1 +", "line 2"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def get_config(variant):\n    return 1 / 0", "ZeroDivisionError"),
        ("def get_config(variant):\n    return {}['a']", "KeyError: 'a'"),
        ("x = 1", "has no function get_config"),
        (
            "from ml_collections import ConfigDict\ndef get_config(_):\n    return ConfigDict()",
            "config.dataset is missing",
        ),
        ("raise SystemExit(3)", "SystemExit"),
        ("def get_config(variant):\n    return 3", "get_config"),
        ("def get_config():\n    return 3", "get_config"),
    ],
)
def test_broken_config_files(tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        parsed(f"--config={path}", WORKDIR)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process; gives its exit code, output and errors."""

    def run(*flags, name="train.py"):
        monkeypatch.setattr("sys.argv", [name, *map(str, flags)])
        # What the command changes of its process stays with it.
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        monkeypatch.setattr("sys.unraisablehook", sys.unraisablehook)
        capsys.readouterr()
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as exit:
                runpy.run_path(str(ROOT / name), run_name="__main__")
        finally:
            signal.signal(signal.SIGTERM, before)
        return exit.value.code or 0, *capsys.readouterr()

    return run


def test_train_then_evaluate(command, tmp_path):
    dataset = write_dataset(tmp_path / "data", random_histories([9] * 8))
    # A model that compiles quickly: the commands treat all alike.
    small = {"model.name": "tests.training.tiny_run:LastItem", "data.max_length": 6}
    small |= {"data.buckets": "(6,)", "train.batch_size": 8, "train.epochs": 1}
    small |= {"eval.batch_size": 8, "dataset": dataset}
    flags = [f"--config.{name}={value}" for name, value in small.items()]
    run = tmp_path / "run"
    code, said, _ = command(CONFIG, f"--workdir={run}", *flags)
    assert code == 0 and "epoch 1" in said
    figures = json.loads((run / "metrics.json").read_text())
    code, said, _ = command(f"--workdir={run}", "--split=test", name="eval.py")
    assert code == 0 and f"{figures['test']['ndcg@10']:.4f}" in said


def test_help(command):
    code, said, errors = command("--help")
    assert (code, errors) == (0, "")
    assert "python train.py --config configs/quickstart.py --workdir runs/quickstart" in said


def test_help_lists_every_setting(command):
    _, said, _ = command("--help")
    for name, value in config_lib.flatten(config_lib.default()).items():
        assert f"\n  {name} = {value!r}" in said
    lines = config_lib.setting_help(config_lib.default())
    assert all(lines[name] for name in config_lib.flatten(config_lib.default()))
    assert "it is executed" in said


def test_print(command, tmp_path):
    code, said, errors = command(
        f"{CONFIG}:causal", "--print", "--config.seed=3", f"--workdir={tmp_path / 'run'}"
    )
    assert (code, errors, list(tmp_path.iterdir())) == (0, "", [])
    values = {words[0]: words[1:] for words in map(str.split, said.splitlines()) if words}
    assert values["seed"] == ["3", "command", "line"]
    assert values["max_length"] == ["200", str(ROOT / "configs" / "ml1m.py")]
    assert values["hidden_size"] == ["64", "default"]
    assert values["convention"] == ["exact", "follows", "from", "other", "settings"]
    assert "python -m data_prep movielens ml-1m --order recbole --out data/ml-1m" in said
    assert str(tmp_path / "run") in said


def test_missing_data_is_prepared(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "mine.py"
    config.write_text(
        "from tim4rec_jax.config import default\n"
        "def get_config(variant):\n"
        "    config = default()\n"
        "    config.dataset = 'data/x'\n"
        "    config.prepare = 'python -m data_prep synthetic --users 20 --out data/x'\n"
        "    return config\n"
    )
    trained = []

    def train(config, workdir, batches, *_):
        trained.append((batches.dataset.n_users, workdir))
        raise SystemExit

    monkeypatch.setattr("tim4rec_jax.training.train._train", train)
    code, said, errors = command("--config=mine.py")
    assert (code, errors) == (0, "")
    assert said.startswith("data/x is not there yet; preparing it with `python -m data_prep syn")
    assert (tmp_path / "data" / "x" / "dataset.json").exists()
    assert trained == [(20, Path("runs/mine"))]


def test_data_that_cannot_be_fetched(command, tmp_path, monkeypatch):
    url = "http://no-such-host.invalid/ml-1m.zip"
    source = dataclasses.replace(sources.SOURCES["movielens"], url=lambda flags: url)
    monkeypatch.setitem(sources.SOURCES, "movielens", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    code, _, errors = command(CONFIG)
    assert code == 1
    assert errors.startswith("error: cannot download ml-1m.zip (")
    assert errors.endswith(
        f"fetch {url} by other means and run `python -m data_prep movielens ml-1m --order recbole "
        "--out data/ml-1m --source ml-1m.zip`\n"
    )
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_settings_of_another_run_are_told_apart_before_data_is_prepared(command, tmp_path):
    config, _ = parsed(CONFIG)
    write_settings(config, tmp_path / "config.json")
    (tmp_path / "log.jsonl").touch()  # it has begun
    code, said, errors = command(CONFIG, f"--workdir={tmp_path}", "--config.train.epochs=3")
    assert (code, said) == (1, "")
    assert "holds a run with other settings: train.epochs (300 -> 3)" in errors


def test_sigterm_before_the_first_step_leaves_nothing_behind(command, tmp_path, monkeypatch):
    def asked(*_):
        assert (tmp_path / "run" / "config.json").exists()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(dispatch.HostSteps, "lowered", asked)
    monkeypatch.setattr(os, "_exit", sys.exit)
    dataset = write_dataset(tmp_path / "data", random_histories([8] * 4))
    flags = [f"--config.dataset={dataset}", "--config.data.placement=host"]
    code, said, errors = command(CONFIG, f"--workdir={tmp_path / 'run'}", *flags)
    assert (code, errors) == (130, "error: interrupted\n")
    assert "stopped; no step has been trained yet" in said
    assert not (tmp_path / "run").exists()


def test_a_dataset_not_prepared_yet(command, tmp_path):
    code, said, errors = command(CONFIG, f"--workdir={tmp_path}", "--config.dataset=nowhere")
    assert (code, said) == (1, "")
    assert errors == (
        "error: nowhere is not a prepared dataset; correct --config.dataset, or prepare it with "
        "`python -m data_prep movielens ml-1m --order recbole --out nowhere`\n"
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.model.head_dim=48"], "config.model.head_dim is 48"),
        (["--config.seed=-1"], "config.seed is -1"),
        (["--config.data.valid_from=soon", "--config.data.split=global_time"], "soon"),
        (["--config.data.buckets=(10,20)"], "buckets (10, 20) must be positive and the longest"),
        (["--config.data.buckets=(0,)"], "buckets (0,) must be positive"),
        (["--config.seed=18446744073709551616"], "config.seed is 18446744073709551616"),
        (["--config.train.epochs=2147483647", "--config.train.batch_size=2"], "2^31 steps"),
        (["--config.data.valid_from=2001-01-01"], "the split leave_one_out does not use"),
        (
            ["--config.data.split=global_time", "--config.data.test_from=2100-01-01"],
            "has no test events",
        ),
        (["--config.model.hidden_size=1000000"], "parameters with gradient and optimiser need at"),
        (["--config.train.batch_size=1000000000"], "lower config.train.batch_size"),
        (["--config.eval.batch_size=1000000000"], "lower config.eval.batch_size"),
        (["--config.data.max_length=1000000000"], "config.data.max_length"),
        (["--config.train.loss=bpr", "--config.train.negatives=2147483647"], "train.negatives"),
        (["--workdir=/dev/null"], "/dev/null"),
        (["--workdir=/proc/nowhere/run"], "/proc"),
    ],
    ids=str,
)
def test_what_is_wrong_only_with_the_data_in_hand(command, tmp_path, flags, words):
    dataset = write_dataset(tmp_path / "data", random_histories([8] * 4))
    flags = [CONFIG, f"--workdir={tmp_path / 'run'}", f"--config.dataset={dataset}", *flags]
    code, _, errors = command(*flags)
    assert code == 1
    assert errors.startswith("error: ")
    assert words in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
