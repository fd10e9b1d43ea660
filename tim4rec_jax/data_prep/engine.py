"""What the preparation asks of the engine that runs its SQL: DuckDB on one machine, or Spark.

The rules stand once. Files are read and checked by `read`, which is DuckDB's; with Spark, each file
in a task. `filters` and `writer` have SQL that both engines understand in the same way: names in
double quotes, whole numbers divided by `Engine.divide`, `FILTER (WHERE ...)`, no row ids.
"""

import argparse
import collections
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa
from rich.console import Console

from tim4rec_jax.data_prep.files import SourceFile
from tim4rec_jax.data_prep.sources import Source


class Reading(NamedTuple):
    """What was found in the files.

    Attributes:
      rows: number of rows; empty lines and lines that could not be read at all do not count.
      kept: how many of them meet the condition of the layout (`--where`).
      good: how many of these are not bad.
      bad: the number of bad rows by reason.
      sources: what `files.fingerprint` says of each file.
    """

    rows: int
    kept: int
    good: int
    bad: collections.Counter[str]
    sources: list[dict]


class File(NamedTuple):
    """A sequences file to be written.

    Attributes:
      number: its place among all files, from 0.
      shard: the number of events before its first user, divided by those of a file.
      first: number of users in the files before it.
      users: number of its users.
      events: number of their events.
    """

    number: int
    shard: int
    first: int
    users: int
    events: int


# Takes a folder to write in, a file, its users (`id`, `events`), and its events (`item`, `time`) in
# pieces.
WriteFile = Callable[[Path, File, pa.Table, Iterable[pa.Table]], None]


@runtime_checkable
class Engine(Protocol):
    """Reads files into the table `good`, makes tables by SQL, and writes sorted events.

    Attributes:
      good: SQL of the rows that can be used: "row" (a whole number, in the order of the source),
        "user" and item (text), time (nanoseconds since 1970), rating (null where none is read).
      number: SQL that gives each row of a SELECT another whole number.
      divide: the operator that divides whole numbers without a rest.
    """

    good: str
    number: str
    divide: str

    def read(
        self,
        source: Source,
        found: Sequence[SourceFile],
        flags: argparse.Namespace,
        console: Console,
    ) -> Reading:
        """Reads and checks all files.

        Raises:
          UserError: see `events.read_one` and `read.refuse_coarser_times`.
        """
        ...

    def create(self, name: str, select: str) -> None:
        """Makes a table of what a SELECT gives; one of this name is replaced, and may be read."""
        ...

    def drop(self, *names: str) -> None:
        """Removes tables, and gives their disk back."""
        ...

    def rows(self, select: str) -> list[tuple[Any, ...]]:
        """Returns the few rows that a SELECT gives."""
        ...

    def rank(self, name: str, select: str, key: str) -> None:
        """Makes a table in the order of a column.

        Args:
          name: of the table.
          select: gives `number`, `id`, `events` and the column `key`.
          key: a column with another value in each row.

        The table has the columns number, id, events; "index" (INTEGER, from 1) in the order of
        `key`; and `before`, the sum of `events` in the rows before.
        """
        ...

    def ranked(self, name: str, first: int, count: int) -> pa.Table:
        """Returns `id` and `events` of the `count` rows of a ranked table that follow `first`."""
        ...

    def write_files(
        self,
        directory: Path,
        found: Sequence[File],
        shard: str,
        select: str,
        order: str,
        write: WriteFile,
    ) -> None:
        """Calls `write` for each file, with its users and events in their order.

        Args:
          directory: where the files go.
          found: what to write; `user_index` is the ranked table of their users.
          shard: SQL of the shard of an event.
          select: the rest of a SELECT of events, from FROM on.
          order: SQL of what the events of all files are sorted by.
          write: writes one file; perhaps in another process.
        """
        ...

    def close(self) -> None:
        """Removes all tables, and gives their memory back; nothing else is asked after it."""
        ...
