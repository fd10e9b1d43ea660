"""What a run says: data and model at its start, a line in the terminal, a log, loggers."""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.errors import UserError, first_line, one_line
from tim4rec_jax.files import atomic_write, read_regular
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.training.loggers import Logger

_LARGEST_LOG = 1 << 30  # bytes


def describe_data(batches: TrainBatches | PackedBatches) -> str:
    """Says in two lines what the dataset holds and what a step is given."""
    dataset = batches.dataset
    return (
        f"{dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
        f"{batches.n_targets:,} training samples in {batches.batches_per_epoch:,} batches, "
        f"{batches.layout}; {dataset.split_in_words}\n"
        f"a step: {batches.rows_per_step:,} rows, {batches.events_per_step:,.0f} events, "
        f"{batches.targets_per_step:,.0f} targets"
    )


def describe_model(model: SequenceModel) -> str:
    """Says in one line how many parameters and operations per sample a model has.

    The weights of the model may be shapes.
    """
    graphdef, params = nnx.split(model)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.filter_state(params, nnx.Param)))
    flops = flops_per_sample(graphdef, params, model.max_length)
    return f"model: {count:,} parameters, {flops / 1e6:,.1f} MFLOP per sample (forward)"


def flops_per_sample(graphdef: nnx.GraphDef, params: nnx.State, max_length: int) -> float:
    """Floating-point operations to score all items after one history of `max_length` events.

    XLA counts them in the program before optimisation. Nothing is compiled, and `params` may be
    shapes.
    """

    def scores(params, items, lengths, gaps):
        model = nnx.merge(graphdef, params)
        return model.encode(items, lengths, gaps) @ model.item_table().T

    history = jax.ShapeDtypeStruct((1, max_length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    gaps = jax.ShapeDtypeStruct((1, max_length), jnp.float32)
    analysis = jax.jit(scores).lower(params, history, lengths, gaps).cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Shows that something is going on: in a terminal how long already, in a file two lines.

    Args:
      what: what goes on, for example "compiling the training step".
    """
    started = time.perf_counter()
    if sys.stdout.isatty():
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, transient=True) as progress:
            progress.add_task(what, total=None)
            yield
    else:
        print(what, flush=True)
        yield
    print(f"{what} took {time.perf_counter() - started:.0f} s", flush=True)


class NoLog:
    """The log of a process that writes none, because another one does.

    Attributes:
      result: as of `RunLog`.
    """

    result: Mapping[str, Any] | None = None

    def write(self, kind: str, step: int, **values) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class RunLog:
    """Writes records of a run, and passes their figures on to loggers.

    A run that is resumed removes the records of steps that it will do again. A logger that raises
    is left out from then on, with one sentence: the training is worth more.

    Attributes:
      result: what the loggers are told at the end: what `metrics.json` holds, None before that.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        loggers: Sequence[Logger] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        """Opens the log of a run.

        Args:
          workdir: of the run; holds `log.jsonl`.
          step: number of steps done. Records of later steps are removed: they belong to work
            that was lost and will be done again. Test figures are removed too: a run that goes on
            for more epochs has them at its end.
          loggers: where figures go besides.
          settings: of the run, by their full names, for the loggers.
        """
        path = workdir / "log.jsonl"
        kept = [line for line, kind, done in _records(path) if done <= step and kind != "test"]
        with atomic_write(path, "w") as file:
            file.writelines(kept)
        self._file = path.open("a")
        self._loggers = list(loggers)
        self.result: Mapping[str, Any] | None = None
        self._tell("start", settings or {}, workdir, step)

    def write(self, kind: str, step: int, **values) -> None:
        """Appends one record: `{"kind", "step", "time" (unix seconds), **values}`."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        figures = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        self._tell("log", figures, step)

    def close(self) -> None:
        """Writes what is buffered."""
        self._file.close()
        self._tell("finish", self.result)

    def _tell(self, method: str, *arguments: Any) -> None:
        """Calls a method of each logger."""
        for logger in tuple(self._loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                self._loggers = [other for other in self._loggers if other is not logger]
                name = type(logger).__name__
                text = f"the logger {name} failed ({first_line(error)}); the training goes on"
                print(one_line(f"warning: {text} without it"), file=sys.stderr, flush=True)


def _records(path: Path) -> list[tuple[str, str, int]]:
    """The complete lines of a log, with kind and step; a line cut short by a crash is dropped.

    Raises:
      UserError: the log is damaged.
    """
    if not path.exists():
        return []
    records = []
    try:
        lines = read_regular(path, _LARGEST_LOG).decode().splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):
                record = json.loads(line)
                records.append((line, record["kind"], int(record["step"])))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged at line {len(records) + 1} ({first_line(error)}); delete it: only "
            "the figures of past epochs are lost, and the training goes on"
        ) from error
    return records


class ProgressLine:
    """Where training is: one line that is rewritten in a terminal, or in a file many lines.

    A file gets a line every half minute. The rate is that of the last minute: batches differ in
    width, and other programs come and go.
    """

    def __init__(self, batches_per_epoch: int, epochs: int, samples_per_batch: float):
        self._per_epoch, self._epochs = batches_per_epoch, epochs
        self._samples = samples_per_batch
        self._live = sys.stdout.isatty()
        self._every = 0.5 if self._live else 30.0
        self._marks: deque[tuple[int, float]] = deque()  # steps and times at which it was shown
        self._width = 0

    def update(self, step: int, loss: float) -> dict | None:
        """Shows where training is, if the last time was long enough ago.

        Args:
          step: number of updates done.
          loss: mean loss of the running epoch.

        Returns:
          The figures shown, or None.
        """
        now, marks = time.perf_counter(), self._marks
        if not marks:
            marks.append((step, now))
        if now - marks[-1][1] < self._every or step == marks[-1][0]:
            return None
        while len(marks) > 1 and now - marks[1][1] >= 60:
            marks.popleft()
        first, since = marks[0]
        rate = (step - first) * self._samples / (now - since)
        marks.append((step, now))
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
        """Makes room for an ordinary line, and begins to measure anew after it."""
        if self._live and self._width:
            print(f"\r{'':<{self._width}}\r", end="", flush=True)
            self._width = 0
        self._marks.clear()  # what stands on the ordinary line has taken its time


def duration(seconds: float | int) -> str:
    """Formats seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
