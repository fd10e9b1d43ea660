"""Processes that train together do what one process does, and end together.

Most of what each of them does can be seen in one process that takes itself for one of several.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import multihost_utils

from tests.data.small_dataset import random_histories, write_dataset
from tests.training.tiny_run import last_item, parameters, quick_config
from tim4rec_jax.config import resolve, use_model
from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import UserError
from tim4rec_jax.runtime import item_sharding, put, put_rows
from tim4rec_jax.training import processes
from tim4rec_jax.training import train as loop
from tim4rec_jax.training.dispatch import make_steps
from tim4rec_jax.training.inputs import make_batches
from tim4rec_jax.training.state import init_state

slow = pytest.mark.slow


@pytest.fixture
def one_of(monkeypatch):
    """Lets this process take itself for one of several."""

    def take(index, count):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: count)

    return take


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, random_histories([20] * 40, n_items=29))
    return folder


@pytest.mark.parametrize(
    ("data", "count", "parts"),
    [
        (8, 1, [(0, 1)]),
        (8, 2, [(0, 2), (1, 2)]),
        (4, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (2, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes have the devices of a group
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_the_part_of_each_process(data, count, parts, one_of):
    """Without the right parts, some rows would be trained on twice and others never."""
    for index, part in enumerate(parts):
        one_of(index, count)
        assert processes.share(data) == part
        assert processes.first() == (index == 0) and processes.together() == (count > 1)


def test_parts_that_would_be_uneven(one_of):
    one_of(0, 2)
    with pytest.raises(UserError, match=r"mesh\.data=3 cannot be shared by 2 processes"):
        processes.share(3)


@pytest.mark.parametrize(
    ("rows", "data", "catalogue", "words"),
    [
        (15, None, 1, "1 x 1 of 4 devices share .*=15, .*; take a multiple of 4 for it"),
        (6, None, 1, "2 x 1 of 4 .*; take a multiple of 4 for it"),
        (5, None, 2, "1 x 2 of 4 .*; take a multiple of 2 for it"),
        (16, 1, 1, "1 x 1 of 4 .*; let config.mesh.data x config.mesh.catalogue be 4"),
    ],
)
def test_a_process_without_a_device(rows, data, catalogue, words, monkeypatch):
    """It would end with an error of JAX, and the others with one of the network."""
    devices = [SimpleNamespace(process_index=number // 2) for number in range(4)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(UserError, match=words):
        item_sharding(rows, data, catalogue)


class Made(Exception):
    """Carries the batches of a training, which ends there."""


@pytest.mark.parametrize("data", [8, 1])
def test_a_training_makes_the_rows_of_its_process(data, dataset, tmp_path, one_of, monkeypatch):
    """If all made the same rows where devices share them, each row would be trained on twice."""

    def made(*arguments):
        raise Made(make_batches(*arguments))

    monkeypatch.setattr(loop, "make_batches", made)
    config = resolve(quick_config(dataset))
    config.mesh.data, config.mesh.catalogue = data, 8 // data
    whole, shares = make_batches(config, open_dataset(dataset)), []
    for index in range(2):
        one_of(index, 2)
        with pytest.raises(Made) as found:
            loop.train(config, tmp_path)
        shares.append(found.value.args[0][3])
    for name, rows in whole[3].items():
        parts = [share[name] for share in shares]
        if data == 1:  # the devices of both processes compute the scores of the same rows
            np.testing.assert_array_equal(parts, [rows, rows])
        else:
            np.testing.assert_array_equal(np.concatenate(parts), rows)


@pytest.mark.parametrize(
    ("model", "loss", "words"),
    [
        (None, "os:path", "'os:path', which needs the whole item table"),
        ("caser", "cross_entropy", "'caser', which computes with the whole item table"),
        ("popularity", "cross_entropy", "'popularity', which computes with the whole item table"),
    ],
)
def test_what_needs_whole_tables_is_refused(model, loss, words, dataset, tmp_path, one_of):
    """Several processes spread tables without a mesh, and another loss would take its place."""
    config = quick_config(dataset)
    if model is not None:
        use_model(config, model)
    config.train.loss = loss
    one_of(0, 2)
    with pytest.raises(UserError, match=f"{words}.* train in one process"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_step_of_several_processes_is_compiled_for_the_rows_of_all(place, dataset):
    """Otherwise the first step would wait for another program, after all the others began."""
    config = resolve(quick_config(dataset))
    config.mesh.data, config.data.placement = 2, place
    model, ds, shapes = last_item(n_items=31), open_dataset(dataset), []
    for part in ((0, 1), (1, 2)):
        batches = make_batches(config, ds, *part)
        steps = make_steps(config, batches, model, item_sharding(16, 2, 1))
        state = init_state(nnx.state(model), steps.settings.tx, 0, steps.settings.by_row)
        [lowered] = steps.lowered(state)
        shapes.append(jax.tree.leaves(lowered.in_avals))
    assert [aval.shape for aval in shapes[0]] == [aval.shape for aval in shapes[1]]


def test_arrays_of_several_processes_have_the_values_of_one(one_of):
    """In this process are all devices, so that it has all rows."""
    placement = item_sharding(16, 4, 2)
    arrays = {"items": np.arange(32).reshape(16, 2), "weights": np.arange(16.0)}
    for sharding in (placement.by_row, placement.replicated, placement.by_item):
        alone = put(arrays, sharding)
        one_of(0, 2)
        for found in (put(arrays, sharding), put_rows(arrays, sharding)):
            jax.tree.map(np.testing.assert_array_equal, found, alone)
            assert all(array.sharding == sharding for array in found.values())
        one_of(0, 1)


@pytest.mark.parametrize(
    ("wishes", "decided"),
    [
        ([(False, False), (False, False)], (False, False)),
        ([(False, False), (True, False)], (True, False)),
        ([(True, False), (False, False)], (True, False)),
        ([(False, True), (False, False)], (False, True)),
        ([(False, False), (False, True)], (False, False)),
    ],
)
def test_what_processes_agree_on(wishes, decided, one_of, monkeypatch):
    """One stops all of them, and the first one's clock says when to save.

    A process that decided for itself would leave the others waiting in a step for ever.
    """
    for index, wish in enumerate(wishes):
        one_of(index, 2)

        def gathered(own, index=index):
            return np.stack([own if each == index else wishes[each] for each in range(2)])

        monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
        assert processes.agreed(*wish) == decided


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, None),
        ({"COORDINATOR_ADDRESS": "a:1"}, "NUM_PROCESSES and JAX_PROCESS_ID must be set too"),
        ({"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2"}, "must be set too"),
        (
            {"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
            "'2' and JAX_PROCESS_ID is '2'; take numbers, from 0 below",
        ),
        (
            {"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"},
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1},
        ),
        ({"DISTRIBUTED": "auto"}, {}),
    ],
)
def test_how_a_process_joins(variables, asked, monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID", "DISTRIBUTED"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: joined.append(given))
    if isinstance(asked, str):
        with pytest.raises(UserError, match=asked):
            processes.join()
        assert not joined
        return
    processes.join()
    for given in joined:
        del given["heartbeat_timeout_seconds"]
    assert joined == ([] if asked is None else [asked])


@pytest.mark.parametrize(
    ("error", "words", "interrupted"),
    [
        (ValueError("why"), "why", False),
        (KeyboardInterrupt("stopped"), "stopped", True),
        (
            jax.errors.JaxRuntimeError("no answer"),
            "another process of this training is gone",
            False,
        ),
    ],
)
def test_only_the_first_process_speaks_and_an_error_ends_each(
    error, words, interrupted, one_of, monkeypatch, capsys
):
    """A process that waited for the others at its end would wait for ever."""

    def end(said, with_signal=False):
        raise SystemExit(said, with_signal)

    monkeypatch.setattr(processes, "_end", end)
    # The C library is told nothing of this.
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda _: SimpleNamespace(signal=print))
    for index in range(2):
        one_of(index, 2)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended, processes.one_voice():
            print("progress")
            raise error
        assert ("progress" in capsys.readouterr().out) == (index == 0)
        said, with_signal = ended.value.args
        assert words in said and with_signal == interrupted


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


@slow
@pytest.mark.parametrize(
    ("processes", "devices", "data", "catalogue"),
    [(1, 8, 8, 1), (1, 8, 2, 4), (8, 1, 8, 1), (2, 4, 1, 8)],
)
def test_the_same_figures(processes, devices, data, catalogue, dataset, two, tmp_path):
    """However many processes have the eight devices, and whatever the devices share."""
    finish(start(processes, devices, dataset, tmp_path / "run", data, catalogue, 2, 5))
    same_figures(two, tmp_path / "run")


@slow
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


@slow
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
