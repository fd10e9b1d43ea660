"""`train.py` killed, out of disk, asked to stop: the same command ends in the very same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.tree_util import keystr, tree_leaves_with_path

from tests.data.small_dataset import random_histories, write_dataset

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data.max_length": 12,
    "data.buckets": "(12,)",
    "model.hidden_size": 16,
    "model.head_dim": 8,
    "model.d_state": 8,
    "model.num_layers": 1,
    "train.batch_size": 16,
    "train.epochs": 2,
    "eval.batch_size": 16,
}
EPOCH = 102  # batches: 60 users of 30 events


class Training:
    """A run directory and the processes that train in it, one after the other."""

    def __init__(self, folder, name, **settings):
        self.workdir, self.output = folder / name, folder / f"{name}.txt"
        flags = [f"--config.{key}={value}" for key, value in (SETTINGS | settings).items()]
        flags += [f"--config.dataset={folder / 'data'}", f"--workdir={self.workdir}"]
        self.command = [sys.executable, "train.py", "--config=configs/ml100k.py", *flags]
        # One device, as users have.
        flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
        self.environment = os.environ | {"XLA_FLAGS": flags}

    def start(self, *before):
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*before, *self.command],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, *before, patience=None):
        """Exit code and output of a process left alone, or killed when patience ends."""
        self.start(*before)
        try:
            code = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return code, self.output.read_text()

    def steps(self, kind="checkpoints"):
        names = [path.name for path in (self.workdir / kind).glob("*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def signalled(self, number, step, delay=0.0):
        """Starts, sends a signal some time after `step` was saved; exit code and output."""
        self.start()
        while max(self.steps(), default=-1) < step:
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.01)
        time.sleep(delay)
        self.process.send_signal(number)
        return self.process.wait(), self.output.read_text()

    def arrays(self):
        """Every array of the last state and of the best parameters, as bytes."""
        found = {}
        with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks where to put the arrays: anywhere
            for kind, item in (("checkpoints", "state"), ("best", "default")):
                step = self.steps(kind)[-1]
                path = self.workdir / kind / str(step) / item
                for key, leaf in tree_leaves_with_path(checkpointer.restore(path.absolute())):
                    found[f"{kind} {step} {keystr(key)}"] = np.asarray(leaf).tobytes()
        return found

    def validations(self):
        """Step, training loss and metrics of every epoch, as logged."""
        lines = (self.workdir / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        records = [record for record in records if record["kind"] in ("valid", "test")]
        return [{key: record[key] for key in record if key != "time"} for record in records]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_dataset(folder / "data", random_histories([30] * 60, n_items=300), n_items=300)
    return folder


@pytest.fixture(scope="module")
def calm(folder):
    """A training that nothing interrupts."""
    calm = Training(folder, "calm")
    code, said = calm.run()
    assert code == 0, said
    return calm


# Every process takes seconds to start. What ends it has fast tests in one process: kills and
# signals in `test_loop.py`, full disks in `test_checkpoints.py`, exit codes in `test_errors.py`.
@pytest.mark.slow
def test_whatever_ends_the_process_the_bits_stay(folder, calm):
    rng = random.Random(7)
    hit = Training(folder, "hit", **{"train.checkpoint_minutes": 0.002})
    code, said = hit.signalled(signal.SIGKILL, rng.randrange(1, 60), rng.uniform(0, 0.3))
    assert code == -signal.SIGKILL, said
    stopped = full_disk_kill_and_stop(hit, rng)

    code, said = hit.run()
    assert code == 0, said
    assert f"resuming at step {stopped}\n" in said

    ours, theirs = hit.arrays(), calm.arrays()
    assert len(theirs) > 100
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert [record["step"] for record in calm.validations()] == [EPOCH, 2 * EPOCH, 2 * EPOCH]
    assert hit.validations() == calm.validations()
    figures = [json.loads((run.workdir / "metrics.json").read_text()) for run in (hit, calm)]
    times = {"seconds": 0, "processor_seconds": 0}
    assert figures[0] | times == figures[1] | times
    assert not list(hit.workdir.rglob("*tmp*"))


@pytest.mark.slow
def test_a_hundred_kills(folder, calm):
    """At random moments of a process: while it starts, compiles, trains, validates or writes."""
    rng, kills, runs, seconds = random.Random(11), 0, 0, 0.0
    theirs = calm.arrays()
    begun = time.monotonic()
    while kills < 100:
        hit = Training(folder, f"hit{runs}", **{"train.checkpoint_minutes": 0.002})
        # The first run is left alone: it tells how long a run takes.
        patience = rng.uniform(0, 1.2) * seconds if runs else None
        code, said = hit.run(patience=patience)
        seconds = seconds if runs else time.monotonic() - begun
        while code == -signal.SIGKILL:
            kills += 1
            # The last one is left alone.
            patience = rng.uniform(0, 1.2) * seconds if kills < 100 else None
            code, said = hit.run(patience=patience)
        assert code == 0, said
        runs += 1
        ours = hit.arrays()
        assert [name for name in theirs if ours[name] != theirs[name]] == []
        assert hit.validations() == calm.validations()


def full_disk_kill_and_stop(hit, rng):
    """Ends three more processes of the training; returns the step at which the last one stopped."""
    # A disk that takes no file of more than 16 KB: less than the table of items has. Coverage would
    # write a larger file of its own into it, and its complaint would be the last line of output.
    limited = 'unset COVERAGE_PROCESS_START COVERAGE_PROCESS_CONFIG; ulimit -f 32; exec "$@"'
    before = hit.steps()
    code, said = hit.run("sh", "-c", limited, "sh")
    assert code == 1
    assert said.splitlines()[-1] == (
        f"error: a checkpoint cannot be written to {hit.workdir} (File too large); the one "
        "before it is kept: put that right and run the same command again"
    )
    assert "Traceback" not in said
    assert hit.steps() == before

    step, delay = rng.randrange(EPOCH, EPOCH + 40), rng.random() / 5
    code, said = hit.signalled(signal.SIGKILL, step, delay)
    assert code == -signal.SIGKILL, said
    assert f"resuming at step {before[-1]}\n" in said
    before = hit.steps()

    code, said = hit.signalled(signal.SIGTERM, max(before[-1], EPOCH) + 5)
    assert f"resuming at step {before[-1]}\n" in said
    stopped = hit.steps()[-1]
    assert code == 130
    assert f"stopped at step {stopped}, saved; run the same command to go on" in said
    assert said.splitlines()[-1] == "error: interrupted"
    assert EPOCH < stopped < 2 * EPOCH
    return stopped
