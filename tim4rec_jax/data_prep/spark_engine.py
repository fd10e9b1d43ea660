"""Runs the preparation on Spark, for logs that are too large for one machine.

Each file is read and checked in a task of its own, by DuckDB, as on one machine; so the rules for
columns, times and bad rows are the same. Filters, numbers and order are SQL. Each sequences file is
written by the task that sorts its events. Tables are Parquet files in the work folder, which all
machines must see at the same path, like the files of the log and the folder of the dataset.
"""

import argparse
import collections
import contextlib
import dataclasses
import errno
import functools
import importlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import dataset
from pyarrow.fs import LocalFileSystem
from rich.console import Console

from tim4rec_jax.data_prep import events, files, read
from tim4rec_jax.data_prep.database import connect, quote_text
from tim4rec_jax.data_prep.engine import File, Reading, WriteFile
from tim4rec_jax.data_prep.failures import one_sentence
from tim4rec_jax.data_prep.sources import Source
from tim4rec_jax.errors import UserError, first_line

_ROWS = 1 << 40  # at most, of a file
_TASK_MEMORY = "1GB"  # of DuckDB in a task that reads a file
# Any of these says that somebody has set up Spark, and we change nothing but the SQL.
_SET_UP = ("PYSPARK_SUBMIT_ARGS", "PYSPARK_GATEWAY_PORT", "SPARK_CONF_DIR", "SPARK_HOME")
# What both engines understand of SQL, Spark only understands with the first two.
_SQL = {
    "spark.sql.ansi.enabled": "true",
    "spark.sql.ansi.doubleQuotedIdentifiers": "true",
    "spark.sql.session.timeZone": "UTC",
}


@contextlib.contextmanager
def spark_engine(work: Path, memory_limit: str | None) -> Iterator["SparkEngine"]:
    """Opens Spark, and closes it in the end unless it was open before in this process.

    Spark takes its settings from where spark-submit takes them: PYSPARK_SUBMIT_ARGS,
    SPARK_CONF_DIR, SPARK_HOME. Without any it runs in this process, on all cores.

    Args:
      work: a folder for tables and temporary files, which all machines see.
      memory_limit: of DuckDB in each task that reads a file, such as "4GB"; default 1 GB.

    Raises:
      UserError: pyspark or Java is missing or does not start; or, inside the block, Spark fails.
    """
    connect(work, memory_limit).close()  # refuses what is no size
    errors = _import_pyspark()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_cause(errors))
        stack.enter_context(_quiet())
        yield SparkEngine(_session(work, stack), work, memory_limit or _TASK_MEMORY)


def _import_pyspark() -> tuple[type[Exception], ...]:
    """Imports pyspark, and returns the classes of its errors."""
    try:
        # pandas is not used here.
        warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")
        java = importlib.import_module("py4j.protocol").Py4JError
        spark = importlib.import_module("pyspark.errors").PySparkException
    except ImportError as error:
        raise UserError(
            "--engine spark needs pyspark, which is not installed; pip install 'tim4rec-jax[spark]'"
        ) from error
    return spark, java


def _session(work: Path, stack: contextlib.ExitStack) -> Any:
    """Returns a session of its own in the Spark that is open, or in a new one."""
    session = importlib.import_module("pyspark.sql").SparkSession
    spark = session.getActiveSession()
    if spark is None:
        _check_java()
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        builder = session.builder.appName("tim4rec data_prep")
        for name, value in _settings(work).items():
            builder = builder.config(name, value)
        # Java prints half a page when it starts.
        with open(work / "spark.log", "wb") as log, _errors_to(log.fileno()), _interrupted_later():
            try:
                spark = builder.getOrCreate()
            except Exception as error:
                said = (work / "spark.log").read_text(errors="replace").strip().splitlines()
                raise UserError(
                    f"Spark does not start ({first_line(error)} {said[-1] if said else ''}); it "
                    "needs Java 17 or later, which JAVA_HOME or PATH can name"
                ) from error
            stack.callback(_stop, spark)
    ours = spark.newSession()
    for name, value in _SQL.items():
        ours.conf.set(name, value)
    return ours


def _check_java() -> None:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(os.path.join(home, "bin", "java") if home else "java")
    if java is None and "PYSPARK_GATEWAY_PORT" not in os.environ:
        where = f"in JAVA_HOME, which is {home}" if home else "on the PATH"
        raise UserError(
            f"--engine spark needs Java 17 or later, and there is none {where}; install one, such "
            "as openjdk-17-jre-headless, or set JAVA_HOME"
        )


def _settings(work: Path) -> dict[str, str]:
    """The settings of Spark on this machine, if there are no others."""
    settings = {"spark.log.level": "ERROR", "spark.ui.showConsoleProgress": "false"}
    if not any(name in os.environ for name in _SET_UP):
        settings |= {
            "spark.master": "local[*]",
            "spark.ui.enabled": "false",
            "spark.local.dir": str(work / "spill"),
            # The default, 200, is for a cluster.
            "spark.sql.shuffle.partitions": str(4 * (os.cpu_count() or 1)),
        }
    return settings


@contextlib.contextmanager
def _errors_to(file: int) -> Iterator[None]:
    """Has programs that are started inside write their errors to an open file."""
    before = os.dup(2)
    os.dup2(file, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@contextlib.contextmanager
def _interrupted_later() -> Iterator[None]:
    """Has Ctrl-C wait for the end of the block, and a second one act at once.

    Java would never end if it lost us while it starts. Spark's own handler, which is replaced in
    the end, would talk to Java, perhaps in the middle of another message.
    """
    before, asked = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def wait(number, frame):
        asked.append((number, frame))
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        before(*asked[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps py4j from logging the traceback of each error that it raises too."""

    def is_of_others(record: logging.LogRecord) -> bool:
        return "py4j" not in record.pathname

    root = logging.getLogger()
    root.addFilter(is_of_others)
    try:
        yield
    finally:
        root.removeFilter(is_of_others)


def _stop(spark: Any) -> None:
    with contextlib.suppress(Exception):  # Java may have died; what matters has been told
        spark.stop()


@contextlib.contextmanager
def _one_cause(errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turns an error of Spark into one sentence.

    Raises:
      OSError: the disk is full.
      UserError: for every other error of Spark.
    """
    try:
        yield
    except errors as error:
        text = str(error)
        # The last of Java's causes, the end of Python's traceback in a task, or the first line.
        causes = re.findall(r"^Caused by: (.+)", text, re.M) or re.findall(
            r"^[\w.]+(?:Error|Exception): .+", text, re.M
        )
        cause = causes[-1] if causes else first_line(error)
        if "No space left" in text:
            raise OSError(errno.ENOSPC, "No space left on device") from error
        if "OutOfMemoryError" in text or "Java heap space" in text:
            raise UserError(
                f"the memory of Spark does not suffice ({cause}); give it more, on this machine "
                "with PYSPARK_SUBMIT_ARGS='--driver-memory 4g pyspark-shell'"
            ) from error
        raise UserError(f"Spark fails ({cause}); correct its settings, or run it again") from error


class SparkEngine:
    """See `engine.Engine`.

    Args:
      spark: a session whose SQL is ANSI.
      work: a folder for tables and temporary files, which all machines see.
      memory: of DuckDB in each task that reads a file.
    """

    good = "raw"
    number = "monotonically_increasing_id()"
    divide = "DIV"

    def __init__(self, spark: Any, work: Path, memory: str):
        self.spark = spark
        self.work = work
        self.memory = memory
        self.made = itertools.count()
        self.folders: dict[str, Path] = {}

    def read(
        self,
        source: Source,
        found: Sequence[files.SourceFile],
        flags: argparse.Namespace,
        console: Console,
    ) -> Reading:
        """See `Engine.read`; each file is read in a task."""
        folder = self.work / "raw"
        folder.mkdir()
        # A task may run where the current folder is another one.
        paths = [dataclasses.replace(file, path=file.path.absolute()) for file in found]

        task = functools.partial(_read_task, paths, source, flags, folder, self.memory)
        with console.status(f"reading {len(found):,} files"):
            tasks = self.spark.range(0, len(found), 1, len(found))
            rows = sorted(tasks.mapInArrow(task, "number long, told string").collect())
        reading = gather([json.loads(row.told) for row in rows])
        self._name("raw", folder)
        return reading

    def create(self, name: str, select: str) -> None:
        """See `Engine.create`."""
        self._save(name, self.spark.sql(select))

    def drop(self, *names: str) -> None:
        """See `Engine.drop`."""
        for name in names:
            self.spark.catalog.dropTempView(name)
            shutil.rmtree(self.folders.pop(name))

    def rows(self, select: str) -> list[tuple]:
        """See `Engine.rows`."""
        return [tuple(row) for row in self.spark.sql(select).collect()]

    def rank(self, name: str, select: str, key: str) -> None:
        """See `Engine.rank`; parts of the table are sorted, each by a task."""
        part = importlib.import_module("pyspark.sql.functions").spark_partition_id()
        parts = int(self.spark.conf.get("spark.sql.shuffle.partitions"))
        self.create("unranked", select)
        ranges = self.spark.table("unranked").repartitionByRange(parts, key)
        self._save("unranked", ranges.withColumn("part", part))
        sizes = self.rows(
            "SELECT part, count(*), CAST(sum(events) AS BIGINT) FROM unranked "
            "GROUP BY part ORDER BY part"
        )
        before, rows, done = [], 0, 0
        for part, count, total in sizes:
            before.append((part, rows, done))
            rows, done = rows + count, done + total
        schema = "part integer, rows_before bigint, events_before bigint"
        self.spark.createDataFrame(before, schema).createOrReplaceTempView("parts")
        self.create(
            name,
            "SELECT number, id, events, "
            'CAST(rows_before + row_number() OVER place AS INTEGER) AS "index", '
            "events_before - events + sum(events) OVER place AS before "
            "FROM unranked JOIN parts USING (part) "
            f'WINDOW place AS (PARTITION BY part ORDER BY "{key}")',
        )
        self.drop("unranked")

    def ranked(self, name: str, first: int, count: int) -> pa.Table:
        """See `Engine.ranked`."""
        return _ranked(self.folders[name], first, count)

    def write_files(
        self,
        directory: Path,
        found: Sequence[File],
        shard: str,
        select: str,
        order: str,
        write: WriteFile,
    ) -> None:
        """See `Engine.write_files`; each file is written in a task."""
        by_shard = {file.shard: file for file in found}
        users = self.folders["user_index"]
        task = functools.partial(_write_task, directory, self.work, users, by_shard, write)
        placed = self.spark.sql(f"SELECT CAST({shard} AS INTEGER) AS shard, * {select}")
        placed = placed.repartitionById(found[-1].shard + 1, "shard")
        placed.createOrReplaceTempView("placed")
        ordered = self.spark.sql(f"SELECT shard, item, time FROM placed SORT BY {order}")
        written = ordered.mapInArrow(task, "number long").collect()
        if sorted(row.number for row in written) != list(range(len(found))):
            raise RuntimeError(f"{len(written)} of {len(found)} sequences files were written")

    def close(self) -> None:
        """See `Engine.close`; Spark itself is closed by what opened it."""
        self.drop(*list(self.folders))

    def _save(self, name: str, frame: Any) -> None:
        folder = self.work / f"{name}-{next(self.made)}"
        frame.write.parquet(_uri(folder))
        if name in self.folders:
            shutil.rmtree(self.folders[name])
        self._name(name, folder)

    def _name(self, name: str, folder: Path) -> None:
        pattern = re.sub(r"([\[\]{}*?\\,])", r"\\\1", _uri(folder))  # globs are read, not written
        self.spark.read.parquet(pattern).createOrReplaceTempView(name)
        self.folders[name] = folder


def _read_task(
    paths: Sequence[files.SourceFile],
    source: Source,
    flags: argparse.Namespace,
    folder: Path,
    memory: str,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for number in batch.column(0).to_pylist():
            told = read_file(number, paths[number], source, flags, folder, memory)
            yield pa.record_batch({"number": [number], "told": [json.dumps(told)]})


def _write_task(
    directory: Path,
    work: Path,
    users: Path,
    by_shard: dict[int, File],
    write: WriteFile,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    pieces = (pa.table(batch) for batch in batches)
    first = next(pieces, None)
    if first is None:  # no user begins in this shard
        return
    file = by_shard[first.column("shard")[0].as_py()]
    # The same task may run twice at once, so the file gets its name when it is complete.
    with tempfile.TemporaryDirectory(prefix="writing-", dir=work) as made:
        write(
            Path(made),
            file,
            _ranked(users, file.first, file.users),
            (piece.drop("shard") for piece in itertools.chain([first], pieces)),
        )
        for one in Path(made).iterdir():
            os.replace(one, directory / one.name)
    yield pa.record_batch({"number": [file.number]})


def read_file(
    number: int,
    file: files.SourceFile,
    source: Source,
    flags: argparse.Namespace,
    folder: Path,
    memory: str,
) -> dict[str, Any]:
    """Reads a file, checks its rows, and writes the good ones to a Parquet file.

    Args:
      number: of the file, from 0.
      file: the file.
      source: its family.
      flags: of the command line.
      folder: where the Parquet file goes. Its columns are those of `Engine.good`.
      memory: of DuckDB.

    Returns:
      `counts` and `span` (see these functions of `read`), `bad`, `unit`, and `source`, as
      `files.fingerprint` returns it; or only `error`, a sentence for the user.
    """
    try:
        with (
            one_sentence(flags.out),
            tempfile.TemporaryDirectory(prefix="reading-", dir=folder.parent) as work,
            contextlib.closing(connect(Path(work), memory)) as con,
        ):
            con.execute("SET threads = 1")  # other tasks have the other cores
            read.create(con)
            bad, unit = events.read_one(con, source, file, flags)
            made = Path(work) / "good.parquet"
            con.execute(
                f'COPY (SELECT rowid + {number * _ROWS} AS "row", "user", item, time, rating '
                f"FROM raw WHERE kept AND problem IS NULL) TO {quote_text(made)} (FORMAT parquet)"
            )
            os.replace(made, folder / f"part-{number}.parquet")
            return {
                "counts": read.count(con),
                "span": read.span(con),
                "bad": bad,
                "unit": unit,
                "source": files.fingerprint(file),
            }
    except UserError as error:
        return {"error": str(error)}


def gather(told: Sequence[dict[str, Any]]) -> Reading:
    """Puts together what `read_file` returned for each file.

    Raises:
      UserError: for the first file that cannot be used, or if all times are in another unit.
    """
    bad: collections.Counter[str] = collections.Counter()
    for one in told:
        if "error" in one:
            raise UserError(one["error"])
        bad += collections.Counter(one["bad"])
    spans = [one["span"] for one in told if one["span"][0] is not None]
    read.refuse_coarser_times(
        min((first for first, _ in spans), default=None),
        max((last for _, last in spans), default=None),
        [one["unit"] for one in told],
    )
    rows, kept, good = (
        sum(counts) for counts in zip(*(one["counts"] for one in told), strict=True)
    )
    return Reading(rows, kept, good, bad, [one["source"] for one in told])


def _ranked(folder: Path, first: int, count: int) -> pa.Table:
    index = dataset.field("index")
    table = dataset.dataset(str(folder), format="parquet", filesystem=LocalFileSystem()).to_table(
        ["index", "id", "events"], filter=(index > first) & (index <= first + count)
    )
    return table.sort_by("index").drop("index")


def _uri(folder: Path) -> str:
    return f"file://{folder}"
