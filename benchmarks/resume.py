"""Checks that a training that is killed and continued ends with the same bits as one that is not.

python -m benchmarks.resume --dataset data/ml-100k [--kills 3] [--seed 0]

Trains a small model with `train.py` twice. One run is undisturbed. The other run is killed with
SIGKILL at random moments, and each time the same command continues it. Then every number that the
two runs leave is compared.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "model.hidden_size": 16,
    "model.head_dim": 8,
    "model.d_state": 8,
    "train.batch_size": 1024,
    "train.epochs": 2,
    "train.checkpoint_minutes": 0.02,
    # One width is enough: compiling it is already much of the time.
    "data.buckets": "(50,)",
}


def start(dataset: Path, workdir: Path) -> subprocess.Popen:
    """Starts the command; its output goes to a file beside `workdir`."""
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "train.py", "--config=configs/ml100k.py", *flags]
    command += [f"--config.dataset={dataset.absolute()}", f"--workdir={workdir}"]
    with workdir.with_suffix(".txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for the end of a training."""
    if process.wait():
        sys.exit(f"train.py failed:\n{workdir.with_suffix('.txt').read_text()}")


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def half_written(workdir: Path) -> int:
    """Returns the number of checkpoints that the kill left incomplete."""
    return len(list(workdir.glob("*/*.orbax-checkpoint-tmp*")))


def leaves(workdir: Path) -> dict[str, np.ndarray]:
    """Returns every array of the last state and of the best parameters."""
    logging.set_verbosity(logging.ERROR)
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for kind, item in (("checkpoints", "state"), ("best", "default")):
            step = max(int(path.name) for path in (workdir / kind).iterdir())
            tree = checkpointer.restore((workdir / kind / str(step) / item).absolute())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                arrays[f"{kind}/{step}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return arrays


def figures(workdir: Path) -> dict:
    """Returns metrics.json without the seconds."""
    values = json.loads((workdir / "metrics.json").read_text())
    return {key: value for key, value in values.items() if key != "seconds"}


def main() -> None:
    """Trains, kills, compares, prints; exits 1 if a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True, help="a prepared dataset")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args()
    rng = random.Random(flags.seed)

    with tempfile.TemporaryDirectory() as folder:
        calm, killed = Path(folder, "undisturbed"), Path(folder, "killed")
        began = time.perf_counter()
        finish(start(flags.dataset, calm), calm)
        last = saved_steps(calm)[-1]
        print(f"undisturbed: {last} steps, {time.perf_counter() - began:.0f} s", flush=True)

        report = Table("kill", "once saved, step", "and after, s", "checkpoints", "half-written")
        moments = sorted(rng.uniform(0, 0.9 * last) for _ in range(flags.kills))
        for number, moment in enumerate(moments, 1):
            process, delay = start(flags.dataset, killed), rng.uniform(0, 2)
            while max(saved_steps(killed), default=-1) < moment and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
            if process.poll() is not None:
                sys.exit(f"the training ended before kill {number}; take another --seed")
            process.kill()
            process.wait()
            found = ", ".join(map(str, saved_steps(killed)))
            report.add_row(
                str(number), f"{moment:.0f}", f"{delay:.2f}", found, str(half_written(killed))
            )
        finish(start(flags.dataset, killed), killed)
        Console().print(report)

        ours, theirs = leaves(killed), leaves(calm)
        differing = [
            name
            for name in sorted(ours.keys() | theirs.keys())
            if name not in ours
            or name not in theirs
            or ours[name].tobytes() != theirs[name].tobytes()
        ]
        same_figures = figures(calm) == figures(killed)
        size = sum(array.nbytes for array in theirs.values())
        print(f"{len(theirs)} arrays, {size:,} bytes; differing: {len(differing)} {differing[:3]}")
        print(f"metrics.json: {'equal' if same_figures else 'DIFFERENT'}")
        sys.exit(bool(differing) or not same_figures)


if __name__ == "__main__":
    main()
