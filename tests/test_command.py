"""The command `tim4rec`: its parts under their names, and the wheel that brings it."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.serving.tiny_run import save_run, tiny_dataset
from tim4rec_jax import __main__ as command
from tim4rec_jax.errors import run_main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tim4rec(capsys, monkeypatch):
    """Runs the command; gives its exit code, output and errors."""

    def run(*words):
        try:
            code = run_main(lambda: command.main([*map(str, words)]))
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return run


def test_help_names_all_commands(tim4rec):
    code, printed, _ = tim4rec()
    assert code == 0
    assert all(re.search(rf"^  {name} ", printed, re.MULTILINE) for name in command.COMMANDS)
    assert tim4rec("--help")[1] == printed
    assert tim4rec("--version")[1].startswith("tim4rec-jax 0.")


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_each_command(tim4rec, name):
    """Nobody who has installed the package can start what only a clone has."""
    code, printed, _ = tim4rec(name, "--help")
    assert code == 0
    assert f"tim4rec {name}" in printed
    assert not [word for word in ("python -m", "train.py", "eval.py") if word in printed]


def test_help_of_the_preparation(tim4rec):
    printed = tim4rec("prepare", "table", "--help")[1]
    assert "tim4rec prepare table events.parquet --user" in printed


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["trian"], 2, "'trian' is no command of tim4rec; did you mean train?"),
        (["x"], 2, "'x' is no command of tim4rec; there are prepare, train"),
        (["train"], 2, "see tim4rec train --help"),
        (["train", "--confg=x"], 2, "see tim4rec train --help"),
        (["train", "--config=nosuch"], 1, "by name there are beauty"),
        (["eval"], 2, "see `tim4rec eval --help`"),
        (["recommend"], 2, "see `tim4rec recommend --help`"),
        (["prepare", "table"], 2, "see `tim4rec prepare table --help`"),
        (["prepare", "table", "--out=o"], 1, "`tim4rec prepare table --help`"),
        (["compare", "--seeds"], 2, "see `tim4rec compare --help`"),
        (["add-items"], 2, "see `tim4rec add-items --help`"),
        (["plan"], 2, "see `tim4rec plan --help`"),
        (["tune"], 2, "see `tim4rec tune --help`"),
        (["verify", "--x"], 2, "see `tim4rec verify --help`"),
        (["verify", "nosuch"], 1, "nosuch is no run directory"),
        (["verify", "--workdir", "nosuch"], 1, "nosuch is no run directory"),
        (["recommend", "--workdir", "a", "--k", "3"], 2, "see `tim4rec recommend --help`"),
    ],
)
def test_mistakes(tim4rec, words, code, says, tmp_path, monkeypatch):
    """Each is told in one sentence; a wrong command line has its own exit code."""
    monkeypatch.chdir(tmp_path)
    found, _, error = tim4rec(*words)
    assert (found, error.count("\n")) == (code, 1)
    assert says in error
    assert "python" not in error


def test_verify(tim4rec, tmp_path):
    run = save_run(tmp_path / "run", tiny_dataset(tmp_path / "data"))
    code, printed, _ = tim4rec("verify", run)
    assert code == 0
    assert f"whole  {run / 'config.json'}\n" in printed
    assert "wrong" not in printed
    code, printed, _ = tim4rec("verify", run, "--dataset", tmp_path)
    assert (code, printed.count("wrong  ")) == (1, 1)
    (run / "metrics.json").write_text("{}")  # a copy that ended before `best/`
    shutil.rmtree(run / "best")
    code, printed, _ = tim4rec("verify", run)
    assert code == 1 and "has no best checkpoint yet" in printed
    (run / "config.json").write_text('{"seed": ')
    code, printed, _ = tim4rec("verify", run)
    assert code == 1 and f"whole  {run / 'dataset.json'}" in printed


def test_presets_by_name(tim4rec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, _ = tim4rec("train", "--config", "beauty:causal", "--print")
    assert code == 0
    assert "the run directory is:      runs/beauty-causal" in printed


@pytest.mark.slow
def test_the_wheel(tmp_path):
    """What pip installs has the command and the configurations, and one top-level name."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    configs = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {f"tim4rec_jax/configs/{name}" for name in configs} <= set(names)
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"tim4rec_jax"}
    (points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "tim4rec = tim4rec_jax.__main__:script" in points.read_text()
    words = [sys.executable, "-m", "tim4rec_jax", "train", "--config=ml1m:causal", "--print"]
    found = subprocess.run(words, cwd=tmp_path / "site", check=True, capture_output=True, text=True)
    assert "runs/ml1m-causal" in found.stdout
