"""Two processes of four simulated devices train as one process of eight, or of one, does."""

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
train_and_report(resolve(config), Path(workdir))
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


@pytest.mark.parametrize(("data", "catalogue"), [(8, 1), (2, 4)])
def test_they_are_one_process_of_eight_devices(data, catalogue, dataset, two, tmp_path):
    finish(start(1, 8, dataset, tmp_path / "one", data, catalogue, 2, 5))
    assert len(figures(two)) == 2
    for ours, theirs in zip(figures(two), figures(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_group_of_devices_of_both(dataset, two, tmp_path):
    finish(start(2, 4, dataset, tmp_path / "run", 1, 8, 2, 5))
    for ours, theirs in zip(figures(two), figures(tmp_path / "run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


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
    assert started[1 - killed].returncode != 0, output
    assert "process" in errors
    finish(start(2, 4, *run))
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path / "run"), parameters(two))


def test_another_topology_goes_on(dataset, two, tmp_path):
    """Stopped by a signal at one of two processes; one process of two devices ends it."""
    run = dataset, tmp_path / "run", 8, 1
    started = start(2, 4, *run, 2, 0)
    while not list((tmp_path / "run").glob("checkpoints/[1-9]*")):
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[1].send_signal(signal.SIGTERM)
    finish(started, code=130)
    finish(start(1, 2, dataset, tmp_path / "run", 2, 1, 2, 5))
    for ours, theirs in zip(figures(two), figures(tmp_path / "run"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
