"""What the scripts of this folder share: their flags, their GPU, and the lines that they write."""

import argparse
import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from tim4rec_jax.ssd import BLOCK_IMPLEMENTATIONS, IMPLEMENTATIONS
from tim4rec_jax.ssd.shapes import Shape

FOLDER = Path(__file__).parent


class Session:
    """One run of a script: where it runs, and where its lines of JSON go."""

    def __init__(self, name: str, description: str | None):
        """Reads the command line, and ends the program with 3 where there is no GPU to go on with.

        Args:
            name: of the script, which is in each of its lines.
            description: for --help.
        """
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks.gpu.{name}", description=description
        )
        parser.add_argument(
            "--rehearse",
            action="store_true",
            help="run on a CPU at tiny sizes, with XLA in the place of the kernels",
        )
        parser.add_argument(
            "--warm", action="store_true", help="time once and write nothing, to fill caches"
        )
        flags = parser.parse_args()
        self.rehearse, self.warm = flags.rehearse, flags.warm
        if not self.rehearse and jax.default_backend() != "gpu":
            print(f"there is no GPU here, JAX runs on {jax.default_backend()!r}")
            sys.exit(3)
        default = FOLDER / "results" / datetime.date.today().isoformat()
        folder = Path(os.environ.get("OUT", default))
        folder.mkdir(parents=True, exist_ok=True)
        self._name, self._path, self.failures = name, folder / "results.jsonl", 0

    @property
    def kernel(self) -> str:
        """The implementation that is looked at."""
        return "xla" if self.rehearse else "triton"

    def sized(self, shape: Shape, batch: int | None = None) -> Shape:
        """Returns the shape with `batch` rows if given, or a tiny one in a rehearsal."""
        if self.rehearse:
            return shape._replace(batch=2, length=min(shape.length, 20))
        return shape if batch is None else shape._replace(batch=batch)

    def write(self, **row: Any) -> None:
        """Prints a line and appends it to the file. `ok=False` makes the script fail."""
        self.failures += row.get("ok") is False
        if self.warm:
            return
        line = json.dumps({"script": self._name} | row | {"device": jax.devices()[0].device_kind})
        print(line, flush=True)
        with self._path.open("a") as file:
            print(line, file=file)

    def attempt(self, function: Callable[[], dict], **row: Any) -> None:
        """Writes `row` with what the function returns, or with its error: the next may work."""
        try:
            self.write(**row, **function())
        except Exception as error:
            traceback.print_exc()
            self.write(**row, ok=False, error=f"{type(error).__name__}: {error}"[:1000])

    def finish(self) -> None:
        """Ends the program: with an exit code of 1 if something has failed."""
        sys.exit(f"{self.failures} FAILED" if self.failures else 0)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within it, programs are traced as if there were no kernels for GPUs."""
    jax.clear_caches()
    tables: tuple[Any, ...] = (IMPLEMENTATIONS, BLOCK_IMPLEMENTATIONS)
    with mock.patch.dict(tables[0]), mock.patch.dict(tables[1]):
        for table in tables:
            del table["triton"]
        yield
    jax.clear_caches()
