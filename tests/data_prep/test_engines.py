"""The numbers of users and items, and Spark, which makes the same dataset as DuckDB to the byte."""

import importlib.util
import json
import re
import shutil
import signal
import sys
import types

import numpy as np
import pytest

from tim4rec_jax.data_prep import prepare, spark_engine
from tim4rec_jax.data_prep.duckdb_engine import DuckDBEngine

FLAGS = ("--on-bad-row", "skip", "--shard-events", 100, "--name", "x")


@pytest.fixture
def logs(write):
    """Three files of few users and items, with bad rows, in a folder whose name is hard to read."""
    random = np.random.default_rng(1)
    paths = []
    for number in range(3):
        rows = [
            ",".join(map(str, (f"ü{user}", f"i{item}", 1_650_000_000 + time, rating)))
            for user, item, time, rating in random.integers((40, 60, 3000, 6), size=(300, 4))
        ]
        rows[7 * number + 5 : 7 * number + 8] = "u,i,soon,1", "u,,5,1", "u,i"
        text = "user_id,item_id,timestamp,rating\n" + "\n".join(rows) + "\n"
        paths.append(write(f"a=1 [b]{{c}}%20é,#*/log {number}.csv", text))
    return paths


def contents(dataset):
    return {path.name: path.read_bytes() for path in sorted(dataset.directory.iterdir())}


def test_stable_ids_do_not_depend_on_the_order_of_rows(run, write):
    rows = [
        f"u{user},i{user * step % 7},{9 * step + user}" for step in range(9) for user in range(6)
    ]
    found = []
    for order in (rows, rows[::-1]):
        path = write("a.csv", "user_id,item_id,timestamp\n" + "\n".join(order) + "\n")
        dataset = run("table", path, "--k-core", 2, "--stable-ids", "--shard-events", 20)
        for ids in (dataset.user_ids.to_pylist(), dataset.item_ids.to_pylist()):
            assert ids == sorted(ids)
        files = contents(dataset)
        assert json.loads(files.pop("dataset.json"))["stable_ids"]
        found.append(files)
    assert found[0] == found[1] and len(found[0]) > 2


class _Likewise(DuckDBEngine):
    """Reads files as tasks of Spark do, in no order, and refuses SQL that Spark does not know."""

    good = "raw"
    divide = "/* */ //"

    def read(self, source, found, flags, console):
        folder = flags.out.parent / "parts"
        folder.mkdir()
        told = [
            spark_engine.read_file(number, file, source, flags, folder, "1GB")
            for number, file in enumerate(found)
        ]
        paths = [str(path) for path in sorted(folder.iterdir(), reverse=True)]
        if paths:
            self.con.execute(f"CREATE TABLE raw AS SELECT * FROM read_parquet({paths})")
        shutil.rmtree(folder)
        return spark_engine.gather(told)

    def _known(self, select):
        text = select.replace(self.number, "").replace(self.divide, "")
        # DuckDB's own words; and a minus sign after a name, which Spark takes for a part of it.
        assert not re.search(r"\browid\b|EXCLUDE|::|//|FILTER \((?!WHERE)|OVER \w+ -", text)
        return select

    def create(self, name, select):
        super().create(name, self._known(select))

    def rows(self, select):
        return super().rows(self._known(select))

    def rank(self, name, select, key):
        super().rank(name, self._known(select), key)

    def write_files(self, directory, found, shard, select, order, write):
        self._known(select + order)
        super().write_files(directory, found, shard, select, order, write)


def test_files_that_are_read_by_tasks(run, logs, monkeypatch):
    flags = (
        *FLAGS,
        "--deduplicate",
        "last",
        "--min-rating",
        "1",
        "--k-core",
        4,
        "--since",
        "2020-01-01",
    )
    expected, sentence = contents(run("table", *logs, *flags)), run("table", *logs, fails=True)
    units = ("--time-unit", "ms", "--on-bad-row", "skip")
    coarser = run("table", *logs, *units, fails=True)
    monkeypatch.setattr(prepare, "DuckDBEngine", _Likewise)
    assert contents(run("table", *logs, *flags)) == expected
    assert run("table", *logs, fails=True) == sentence
    assert run("table", *logs, *units, fails=True) == coarser


def test_pyspark_or_java_is_missing(run, logs, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyspark.errors", None)
    assert run("table", *logs, "--engine", "spark", fails=True) == (
        "--engine spark needs pyspark, which is not installed; pip install 'tim4rec-jax[spark]'"
    )
    session = types.SimpleNamespace(getActiveSession=lambda: None)
    for module, members in {
        "py4j.protocol": {"Py4JError": ArithmeticError},
        "pyspark.errors": {"PySparkException": ArithmeticError},
        "pyspark.sql": {"SparkSession": session},
    }.items():
        for name in (module, module.split(".")[0]):
            monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert run("table", *logs, "--engine", "spark", fails=True) == (
        f"--engine spark needs Java 17 or later, and there is none in JAVA_HOME, which is "
        f"{tmp_path}; install one, such as openjdk-17-jre-headless, or set JAVA_HOME"
    )


def test_an_interrupt_waits_for_java_and_the_second_does_not():
    # A shell starts what runs in the background with a Ctrl-C that does nothing.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []
    with pytest.raises(KeyboardInterrupt), spark_engine._interrupted_later():
        signal.raise_signal(signal.SIGINT)
        done.append("started")
    with pytest.raises(KeyboardInterrupt), spark_engine._interrupted_later():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    assert done == ["started"]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


spark = pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None or shutil.which("java") is None,
    reason="needs Java and the extra spark",
)


@spark
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    "flags",
    [
        ("--deduplicate", "last", "--min-rating", "1", "--k-core", 4, "--order", "recbole"),
        ("--stable-ids", "--where", "item_id != 'i3'"),
    ],
    ids=["recbole", "stable_ids"],
)
def test_spark_makes_the_same_dataset(run, logs, flags):
    expected = contents(run("table", *logs, *FLAGS, *flags))
    assert len(expected) > 5
    assert contents(run("table", *logs, *FLAGS, *flags, "--engine", "spark")) == expected


@spark
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_spark_says_the_same_of_mistakes(run, logs, tmp_path):
    for flags in ((), ("--where", "colour = 1"), ("--on-bad-row", "skip", "--k-core", 99)):
        sentence = run("table", *logs, *flags, fails=True)
        assert run("table", *logs, *flags, "--engine", "spark", fails=True) == sentence
