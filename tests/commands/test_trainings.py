"""Trainings as processes: how they end, what they leave, and that they do not outlive us."""

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tests.serving.tiny_run import ONE_DEVICE
from tim4rec_jax.commands import trainings
from tim4rec_jax.commands.trainings import cost, train

ROOT = Path(__file__).parents[2]
# A training that is asked to stop says so and ends as train.py does.
WAITING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: interrupted"))
print("begun", flush=True)
time.sleep(60)
"""


@pytest.fixture
def process(monkeypatch):
    """Has a program of a few lines stand for train.py; `python -S` starts in 20 ms."""

    def stand(code):
        monkeypatch.setattr(trainings, "_COMMAND", (sys.executable, "-S", "-c", code))

    return stand


def begun(folder):
    log = folder / "train.log"
    return log.exists() and "begun" in log.read_text()


def test_a_training_ends_well_or_says_what_was_wrong(tmp_path, process):
    process("import sys; assert sys.argv[2:] == ['--a', f'--workdir={sys.argv[3][10:]}']")
    assert train(tmp_path, ["--a"]) == ""
    first = cost(tmp_path)
    process("import sys; print('much'); sys.exit('error: no\\x1b[31m room')")
    assert train(tmp_path, []) == r"error: no\x1b[31m room"
    assert cost(tmp_path)["cpu"] > first["cpu"] > 0
    process("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert train(tmp_path, []).startswith("killed by SIGKILL, as the system does when memory runs")


def test_a_training_is_stopped(tmp_path, process):
    process(WAITING)
    assert train(tmp_path, [], lambda: begun(tmp_path)) == "error: interrupted"


def test_ctrl_c_is_passed_on_once(tmp_path, process):
    process(WAITING)

    def interrupted():
        if begun(tmp_path):
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [], interrupted)
    assert (tmp_path / "train.log").read_text() == "begun\nerror: interrupted\n"
    assert cost(tmp_path)["cpu"] > 0


def test_a_training_whose_parent_has_died_does_not_begin(monkeypatch, capsys):
    monkeypatch.setattr(trainings.ctypes, "CDLL", MagicMock())
    monkeypatch.setattr(trainings.os, "getppid", lambda: 1)
    assert trainings.main(["1234", "--config=none"]) == 1
    assert capsys.readouterr() == ("", "")
    assert trainings.main(["1", "--config=none"]) == 1
    assert "there is no file none" in capsys.readouterr().err


CONFIG = """
from tests.training.tiny_run import quick_config

def get_config(variant=""):
    return quick_config({data!r}, epochs=8, patience=8)
"""


class Tune:
    """The command on a tiny dataset, with a model that compiles quickly."""

    def __init__(self, folder, name):
        self.out, self.log = folder / name, folder / f"{name}.log"
        words = f"--config={folder}/tiny.py --trials=4 --out={self.out}"
        ranges = "--set train.learning_rate=log:1e-3:1e-1 train.weight_decay=0,1e-5"
        self.command = [
            sys.executable,
            "-m",
            "tim4rec_jax",
            "tune",
            *words.split(),
            *ranges.split(),
        ]

    def start(self):
        with open(self.log, "a") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, cwd=ROOT, env=ONE_DEVICE)

    def trials(self):
        with sqlite3.connect(self.out / "study.db") as db:
            return db.execute(
                "select number, state, value, param_name, param_value from trials join "
                "trial_params using (trial_id) left join trial_values using (trial_id) "
                "order by number, param_name"
            ).fetchall()

    def trained_since(self, number, begun):
        """Whether a trial has validated since a moment."""
        log = self.out / "trials" / f"{number:03}" / "run" / "log.jsonl"
        return log.exists() and log.stat().st_mtime > begun and '"valid"' in log.read_text()


@pytest.mark.slow  # its fast twins: `test_search.py` with trainings that are made up
def test_a_search_of_real_trainings_is_killed_and_goes_on(tmp_path):
    data = write_dataset(tmp_path / "data", random_histories([14] * 40))
    (tmp_path / "tiny.py").write_text(CONFIG.format(data=str(data)))
    calm, hit = Tune(tmp_path, "calm"), Tune(tmp_path, "hit")
    assert calm.start().wait() == 0, calm.log.read_text()
    for number, how in ((1, signal.SIGKILL), (2, signal.SIGINT), (3, signal.SIGTERM)):
        begun, process = time.time(), hit.start()
        while not hit.trained_since(number, begun):
            assert process.poll() is None, hit.log.read_text()
            time.sleep(0.01)
        process.send_signal(how)
        code = process.wait()
        assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
        if code == 130:
            assert hit.log.read_text().endswith(
                "the study is kept: run the same command to go on\nerror: interrupted\n"
            )
    assert hit.start().wait() == 0, hit.log.read_text()
    assert hit.trials() == calm.trials()
    assert len(calm.trials()) == 8
    assert "Traceback" not in hit.log.read_text()
    assert (hit.out / "best.py").read_text() == (calm.out / "best.py").read_text()
    figures = [
        [json.loads((out / "trials" / f"{n:03}" / "run" / "metrics.json").read_text())["valid"]]
        for n in range(4)
        for out in (calm.out, hit.out)
    ]
    assert figures[::2] == figures[1::2]
    # The best settings train as the trial did.
    words = [f"--config={hit.out}/best.py", f"--workdir={tmp_path}/best"]
    command = [sys.executable, "train.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    best = json.loads((tmp_path / "best" / "metrics.json").read_text())["valid"]["ndcg@10"]
    assert best == max(figure[0]["ndcg@10"] for figure in figures)
