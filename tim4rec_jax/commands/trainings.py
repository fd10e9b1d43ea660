"""Trainings as processes of their own, for commands that need many of them.

A process that the system kills for want of memory takes nothing else with it. Each training has a
folder, with the run directory `run/`, what it printed in `train.log`, and what it cost in
`cost.json`.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tim4rec_jax.cli import parse
from tim4rec_jax.config import Config
from tim4rec_jax.data.format import read_metadata
from tim4rec_jax.errors import one_line, run_main
from tim4rec_jax.files import write_json
from tim4rec_jax.run import check_same_dataset, check_unchanged, only_process

_COMMAND = (sys.executable, "-m", "tim4rec_jax.commands.trainings")
_POLL = 0.2  # seconds
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def settings(words: list[str]) -> Config:
    """The settings that a command line of `train.py` means, resolved.

    Raises:
      UserError: a setting is wrong, or some cannot go together.
    """
    return parse(["train.py", *words], usage="")[0]


def finished(run: Path, config: Config) -> bool:
    """Whether a run directory holds a finished run of these settings on the data of now.

    Raises:
      UserError: another run is there, with other settings or of other data, or it is running.
    """
    if (run / "config.json").exists():
        check_unchanged(config, run / "config.json")
        with only_process(run):
            pass
    if not (run / "metrics.json").exists():
        return False
    check_same_dataset(Path(config.dataset), read_metadata(Path(config.dataset)), run)
    return True


def train(folder: Path, words: list[str], stop: Callable[[], bool] = lambda: False) -> str:
    """Trains in a process, from the beginning or from where an earlier one stopped.

    The process saves and ends with Ctrl-C and SIGTERM, and on Linux it dies with this one.

    Args:
      folder: of the training, made if missing.
      words: the command line of `train.py`, without `--workdir`.
      stop: is asked several times a second whether the training is to stop.

    Returns:
      What went wrong, or an empty text if the training is finished.

    Raises:
      KeyboardInterrupt: this process was interrupted. The training has saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.log", "a") as log:
        # In a session of its own: Ctrl-C reaches this process alone, which passes it on.
        process = subprocess.Popen(
            [*_COMMAND, str(os.getpid()), *words, f"--workdir={folder / 'run'}"],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ended = _wait(process, stop)
        except BaseException:
            process.terminate()
            try:
                ended = os.wait4(process.pid, 0)
            except KeyboardInterrupt:  # a second Ctrl-C
                process.kill()
                ended = os.wait4(process.pid, 0)
            _record(process, ended, folder)
            raise
    _record(process, ended, folder)
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        of_memory = ", as the system does when memory runs out" * (name == "SIGKILL")
        return f"killed by {name}{of_memory}"
    return _last_words(folder / "train.log", process.returncode) if process.returncode else ""


def cost(folder: Path) -> dict[str, float]:
    """What the training of a folder has cost, over all its starts; NaN if nothing is known.

    Returns:
      `cpu`, seconds of processor time of all threads, and `memory`, the most megabytes.
    """
    path = folder / "cost.json"
    unknown = {"cpu": float("nan"), "memory": float("nan")}
    return json.loads(path.read_text()) if path.exists() else unknown


def _wait(process: subprocess.Popen, stop: Callable[[], bool]) -> tuple[int, int, Any]:
    """Waits for the end of a process, which it terminates when asked; returns as `os.wait4`."""
    stopping = False
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        if not stopping and stop():
            stopping = True
            process.terminate()
        time.sleep(_POLL)
    return ended


def _record(process: subprocess.Popen, ended: tuple[int, int, Any], folder: Path) -> None:
    """Notes how a process has ended, and adds up what it has cost."""
    process.returncode, usage = os.waitstatus_to_exitcode(ended[1]), ended[2]
    path = folder / "cost.json"
    before = json.loads(path.read_text()) if path.exists() else {"cpu": 0.0, "memory": 0.0}
    now = {
        "cpu": before["cpu"] + usage.ru_utime + usage.ru_stime,
        "memory": max(before["memory"], usage.ru_maxrss / 1024),
    }
    write_json(path, now)


def _last_words(log: Path, code: int) -> str:
    """What a training said at its end, without control characters and not too long."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return one_line(lines[-1] if lines else f"exit code {code}")


def main(words: list[str]) -> int:
    """Runs a training for the process whose number comes first, and ends when that does."""
    parent, *rest = words
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(parent):  # it has died already
        return 1

    def run() -> None:
        from tim4rec_jax.commands.train import main as train

        train(rest)

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
