"""What a run says: a line in the terminal, a JSONL log, TensorBoard events."""

import json
import sys
import time
from pathlib import Path

import tensorboardX

from tim4rec_jax.files import atomic_write


class RunLog:
    """Writes records of a run; what lies after the step resumed from is taken back."""

    def __init__(self, workdir: Path, step: int):
        """Opens the log of a run.

        Args:
          workdir: of the run; holds `log.jsonl` and `tensorboard/`.
          step: of the state the run starts from. Records of later steps belong to work that
            was lost and will be done again.
        """
        path = workdir / "log.jsonl"
        kept = [line for line in _records(path) if json.loads(line)["step"] <= step]
        with atomic_write(path, "w") as file:
            file.writelines(kept)
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, **values) -> None:
        """Appends one record: `{"kind", "step", "time" (unix seconds), **values}`."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()
        self._board.close()


def _records(path: Path) -> list[str]:
    """The complete lines of a log; a line cut short by a crash is dropped."""
    if not path.exists():
        return []
    with path.open() as file:
        return [line for line in file if line.endswith("\n")]


class ProgressLine:
    """One line that is rewritten in a terminal; in a file, a line every half minute."""

    def __init__(self, batches_per_epoch: int, epochs: int, samples_per_batch: float):
        self._per_epoch, self._epochs = batches_per_epoch, epochs
        self._samples = samples_per_batch
        self._live = sys.stdout.isatty()
        self._every = 0.5 if self._live else 30.0
        self._mark = None
        self._width = 0

    def restart_clock(self) -> None:
        """Leaves out what happened since the last update (validation, say) from the rate."""
        self._mark = None

    def update(self, step: int, loss: float) -> dict | None:
        """Shows where training is, if it is time to; returns what it showed, else None.

        Args:
          step: updates finished.
          loss: mean of the running epoch.
        """
        now = time.perf_counter()
        if self._mark is None:
            self._mark = (step, now)
        first, since = self._mark
        if now - since < self._every or step == first:
            return None
        rate = (step - first) * self._samples / (now - since)
        self._mark = (step, now)
        epoch, done = divmod(step - 1, self._per_epoch)
        left = (self._per_epoch - done - 1) * self._samples / rate
        self._show(
            f"epoch {epoch + 1}/{self._epochs}  step {done + 1}/{self._per_epoch}  "
            f"loss {loss:.4f}  {rate:,.0f} samples/s  {duration(left)} left in the epoch"
        )
        return {"epoch": epoch + 1, "loss": loss, "samples_per_second": rate}

    def _show(self, text: str) -> None:
        if self._live:
            print(f"\r{text:<{self._width}}", end="", flush=True)
            self._width = len(text)
        else:
            print(text, flush=True)

    def clear(self) -> None:
        """Makes room for an ordinary line."""
        if self._live and self._width:
            print(f"\r{'':<{self._width}}\r", end="", flush=True)
            self._width = 0


def duration(seconds: float | int) -> str:
    """Formats seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
