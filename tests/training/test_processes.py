"""Processes that train together do what one process does, and end together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tests.training.tiny_run import parameters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, random_histories([20] * 40, n_items=29))
    return folder


PROGRAM = """
import sys
from pathlib import Path
from tests.training.tiny_run import quick_config
from tim4rec_jax.training.train import train_and_report
dataset, workdir, data, catalogue, epochs, minutes = sys.argv[1:]
config = quick_config(dataset, epochs=int(epochs), loss="sampled_softmax", negatives=12)
config.model.repeat_bias = True
config.train.checkpoint_minutes = float(minutes)
config.mesh.data, config.mesh.catalogue = int(data), int(catalogue)
from tim4rec_jax.config import resolve
from tim4rec_jax.errors import run_main
sys.exit(run_main(lambda: train_and_report(resolve(config), Path(workdir))))
"""


def start(processes, devices, *arguments):
    """Starts the processes of a training."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        env = dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices), JAX_PLATFORMS="cpu")
        env["XLA_FLAGS"] = re.sub(r"--xla_force_host\S+", "", env.get("XLA_FLAGS", ""))
        if processes > 1:
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *map(str, arguments)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started, code=0):
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == code, (output, errors)
        assert "Traceback" not in errors


def figures(workdir):
    lines = map(json.loads, (workdir / "log.jsonl").read_text().splitlines())
    return [(r["step"], r["train_loss"], r["ndcg@10"]) for r in lines if r["kind"] == "valid"]


@pytest.fixture(scope="module")
def two(dataset, tmp_path_factory):
    """The run of two processes."""
    workdir = tmp_path_factory.mktemp("runs") / "two"
    finish(start(2, 4, dataset, workdir, 8, 1, 2, 5))
    return workdir


def same_figures(ours, theirs):
    """The losses and validations of two runs, and their tests at the end, to 1e-5."""
    steps = [step for step, *_ in figures(ours)]
    assert len(steps) == 2
    assert steps[-1] >= 50
    for run, other in zip(figures(ours), figures(theirs), strict=True):
        assert run == pytest.approx(other, rel=1e-5)
    tests = [json.loads((run / "metrics.json").read_text())["test"] for run in (ours, theirs)]
    assert tests[0] == pytest.approx(tests[1], rel=1e-5)


@pytest.mark.parametrize(
    ("processes", "devices", "data", "catalogue"),
    [(1, 8, 8, 1), (1, 8, 2, 4), (8, 1, 8, 1), (2, 4, 1, 8)],
)
def test_the_same_figures(processes, devices, data, catalogue, dataset, two, tmp_path):
    """However many processes have the eight devices, and whatever the devices share."""
    finish(start(processes, devices, dataset, tmp_path / "run", data, catalogue, 2, 5))
    same_figures(two, tmp_path / "run")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_kill_ends_both_and_they_go_on_to_the_same_bits(killed, dataset, two, tmp_path):
    run = dataset, tmp_path / "run", 8, 1, 2, 0
    started = start(2, 4, *run)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "run").glob("checkpoints/[1-9]*")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[killed].send_signal(signal.SIGKILL)
    started[killed].communicate()
    output, errors = started[1 - killed].communicate(timeout=120)
    assert started[1 - killed].returncode == 1, output
    assert "error: another process of this training is gone" in errors.splitlines()[-1]
    finish(start(2, 4, *run))
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path / "run"), parameters(two))


@pytest.mark.parametrize(
    ("before", "after"), [((2, 4), (1, 2)), ((1, 2), (2, 4))], ids=["8 to 2", "2 to 8"]
)
def test_another_topology_goes_on(before, after, dataset, two, tmp_path):
    """Stopped by a signal at one of its processes, a training ends on other devices."""
    run = dataset, tmp_path / "run"
    started = start(*before, *run, before[0] * before[1], 1, 2, 0)
    while not list((tmp_path / "run").glob("checkpoints/[1-9]*")):
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[-1].send_signal(signal.SIGTERM)
    finish(started, code=130)
    finish(start(*after, *run, after[0] * after[1], 1, 2, 0))
    same_figures(two, tmp_path / "run")
