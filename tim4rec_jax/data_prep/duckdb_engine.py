"""Runs the preparation on DuckDB: one machine, and tables that may be larger than its memory."""

import argparse
import concurrent.futures
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
from rich.console import Console

from tim4rec_jax.data_prep import events, files, read
from tim4rec_jax.data_prep.database import leave_memory
from tim4rec_jax.data_prep.engine import File, Reading, WriteFile
from tim4rec_jax.data_prep.sources import Source

STREAM_EVENTS = 1_000_000  # read from DuckDB at once


class DuckDBEngine:
    """See `engine.Engine`."""

    good = (
        '(SELECT rowid AS "row", "user", item, time, rating FROM raw '
        "WHERE kept AND problem IS NULL)"
    )
    number = "CAST(row_number() OVER () AS INTEGER)"
    divide = "//"

    def __init__(self, con: duckdb.DuckDBPyConnection):
        self.con = con

    def read(
        self,
        source: Source,
        found: Sequence[files.SourceFile],
        flags: argparse.Namespace,
        console: Console,
    ) -> Reading:
        """See `Engine.read`; the checksums are computed in the meantime."""
        # Both mostly wait for the disk or zlib.
        stop = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            fingerprints = [pool.submit(files.fingerprint, file, stop) for file in found]
            try:
                bad = events.read_all(self.con, source, found, flags, console)
            except BaseException:
                stop.set()
                raise
            sources = [fingerprint.result() for fingerprint in fingerprints]
        return Reading(*read.count(self.con), bad, sources)

    def create(self, name: str, select: str) -> None:
        """See `Engine.create`."""
        self.con.execute(f"CREATE TABLE made AS {select}")
        self.con.execute(f"DROP TABLE IF EXISTS {name}; ALTER TABLE made RENAME TO {name}")

    def drop(self, *names: str) -> None:
        """See `Engine.drop`."""
        for name in names:
            self.con.execute(f"DROP TABLE {name}")

    def rows(self, select: str) -> list[tuple]:
        """See `Engine.rows`."""
        return self.con.execute(select).fetchall()

    def rank(self, name: str, select: str, key: str) -> None:
        """See `Engine.rank`."""
        self.con.execute(
            f"CREATE TABLE {name} AS SELECT number, id, events, "
            'CAST(row_number() OVER place AS INTEGER) AS "index", '
            "CAST(sum(events) OVER place AS BIGINT) - events AS before "
            f'FROM ({select}) WINDOW place AS (ORDER BY "{key}")'
        )

    def ranked(self, name: str, first: int, count: int) -> pa.Table:
        """See `Engine.ranked`."""
        return self.con.sql(
            f'SELECT id, events FROM {name} WHERE "index" > {first} '
            f'AND "index" <= {first + count} ORDER BY "index"'
        ).to_arrow_table()

    def write_files(
        self,
        directory: Path,
        found: Sequence[File],
        shard: str,
        select: str,
        order: str,
        write: WriteFile,
    ) -> None:
        """See `Engine.write_files`; only the users and events of one file are in memory at once."""
        # Files follow each other in the order of their users, so the shard need not be known.
        stream = _Stream(
            self.con.cursor()
            .sql(f"SELECT item, time {select} ORDER BY {order}")
            .to_arrow_reader(STREAM_EVENTS)
        )
        # The events of a file take 12 bytes each. The rest is for its users and what Arrow reads
        # ahead.
        leave_memory(self.con, 30 * max(file.events for file in found))
        for file in found:
            users = self.ranked("user_index", file.first, file.users)
            write(directory, file, users, stream.take(file.events))

    def close(self) -> None:
        """See `Engine.close`."""
        self.con.close()


class _Stream:
    """The rows of an Arrow reader, some at a time."""

    def __init__(self, reader: pa.RecordBatchReader):
        self.reader = reader
        self.left = reader.schema.empty_table()

    def take(self, count: int) -> Iterator[pa.Table]:
        """Yields the next `count` rows in pieces."""
        while count:
            if not len(self.left):
                self.left = pa.table(self.reader.read_next_batch())
            part, self.left = self.left.slice(0, count), self.left.slice(count)
            count -= len(part)
            yield part
