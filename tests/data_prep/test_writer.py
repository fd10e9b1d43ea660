"""A dataset is there whole or not at all."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from tim4rec_jax.data import format as fmt
from tim4rec_jax.data import open_dataset
from tim4rec_jax.data_prep import duckdb_engine, filters, prepare
from tim4rec_jax.data_prep.__main__ import main
from tim4rec_jax.errors import UserError, run_main

ROWS = "user_id,item_id,timestamp\n" + "".join(
    f"u{user},i{(user * user + event) % 7},{event}\n" for event in range(6) for user in range(9)
)


def test_existing_output_is_not_replaced_unasked(run, write, tmp_path):
    path = write("a.csv", ROWS)
    out = tmp_path / "here"
    run("table", path, "--out", out)
    assert run("table", path, "--out", out, fails=True) == (
        f"{out} already holds a dataset; pass --overwrite to replace it or choose another --out"
    )
    run("table", path, "--out", out, "--overwrite", "--name", "second")
    assert open_dataset(out).name == "second"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_dataset_is_never_replaced(run, write, kind):
    precious = write("precious/thesis.tex" if kind == "folder" else "thesis.tex", "years of work")
    out = precious.parent if kind == "folder" else precious
    sentence = run("table", write("a.csv", ROWS), "--out", out, "--overwrite", fails=True)
    assert sentence == f"{out} exists and is no prepared dataset; choose another --out"
    assert precious.read_text() == "years of work"


@pytest.mark.parametrize("name", ["notes.txt", "sequences-of-thoughts.arrow", "sub/items.parquet"])
def test_notes_in_a_dataset_are_never_removed(run, write, name):
    path = write("a.csv", ROWS)
    out = run("table", path).directory
    notes = write(f"out/{name}", "years of work")
    sentence = run("table", path, "--out", out, "--overwrite", fails=True)
    assert sentence == (
        f"{out} holds {name.split('/')[0]}, which this command has not made; move it away or "
        "choose another folder"
    )
    assert notes.read_text() == "years of work" and open_dataset(out).n_events == 54


@pytest.mark.parametrize("content", ["{}", "[1]", "[" * 200_000, "\xff"])
def test_a_dataset_of_another_kind_is_never_replaced(run, write, content):
    precious = write("precious/dataset.json", content)
    sentence = run(
        "table", write("a.csv", ROWS), "--out", precious.parent, "--overwrite", fails=True
    )
    assert sentence == f"{precious.parent} exists and is no prepared dataset; choose another --out"
    assert precious.read_text() == content


def test_the_picture_of_a_dataset_does_not_hinder(run, write):
    path = write("a.csv", ROWS)
    out = run("table", path, "--shard-events", "6").directory
    write("out/inspect.png", "")
    run("table", path, "--out", out, "--overwrite")
    assert not (out / "inspect.png").exists()


def test_a_pipe_and_a_link_in_the_place_of_our_files(run, write, tmp_path):
    path, out = write("a.csv", ROWS), run("table", write("a.csv", ROWS)).directory
    (out / "inspect.png").symlink_to(path)
    sentence = run("table", path, "--out", out, "--overwrite", fails=True)
    assert "holds inspect.png, which this command has not made" in sentence
    (out / "dataset.json").unlink()
    os.mkfifo(out / "dataset.json")
    sentence = run("table", path, "--out", out, "--overwrite", fails=True)
    assert "exists and is no prepared dataset" in sentence


def test_an_empty_folder_is_taken(run, write, tmp_path):
    (tmp_path / "empty").mkdir()
    run("table", write("a.csv", ROWS), "--out", tmp_path / "empty")


def test_a_failing_run_keeps_the_old_dataset(run, write, tmp_path):
    good, bad = write("a.csv", ROWS), write("b.csv", ROWS + "u,i,soon\n")
    run("table", good, "--out", tmp_path / "out")
    run("table", bad, "--out", tmp_path / "out", "--overwrite", fails=True)
    assert open_dataset(tmp_path / "out").n_events == 54


def test_killed_runs_leave_nothing_and_do_not_hinder(run, write, tmp_path):
    out = tmp_path / "out"
    program = (
        "import sys, time; from tim4rec_jax.data_prep import writer\n"
        "writer.write = lambda *_, **__: time.sleep(600)\n"
        "from tim4rec_jax.data_prep.__main__ import main; main(sys.argv[1:])"
    )
    arguments = ["table", str(write("a.csv", ROWS)), "--out", str(out)]
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while not (tmp_path / ".out.partial" / "out").exists():
        assert process.poll() is None
        time.sleep(0.01)
    sentence = _while_another_runs(run, write, out)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sentence == f"another run is writing {out}; wait for it"
    assert not out.exists()
    assert run("table", write("b.csv", ROWS), "--out", out).n_events == 54
    assert not (tmp_path / ".out.partial").exists()


def _while_another_runs(run, write, out):
    with pytest.raises(UserError) as error:
        main(["table", str(write("c.csv", ROWS)), "--out", str(out)])
    assert (out.parent / ".out.partial" / "out").exists(), "the other run's files are gone"
    return str(error.value)


def test_shards_hold_whole_users(run, write, histories):
    path = write("a.csv", ROWS)
    whole = histories(run("table", path, "--k-core", "1"))
    for shard_events in (1, 6, 13, 53, 54):
        ds = run("table", path, "--k-core", "1", "--shard-events", shard_events)
        assert histories(ds) == whole
        shards = ds.metadata["shards"]
        names = [fmt.sequences_file(shard, shards) for shard in range(shards)]
        assert sorted(file.name for file in ds.directory.glob("sequences*")) == names
        sizes = []
        for name in names:
            with pa.ipc.open_file(ds.directory / name) as file:
                assert file.num_record_batches == 1
                sizes.append(len(pa.compute.list_flatten(file.get_batch(0)["items"])))
        assert max(sizes) < shard_events + 6
        assert sum(sizes) == 54


def test_batches_of_the_stream_do_not_show(run, write, histories, monkeypatch):
    path = write("a.csv", ROWS)
    whole = run("table", path).directory.joinpath("sequences.arrow").read_bytes()
    monkeypatch.setattr(duckdb_engine, "STREAM_EVENTS", 5)
    assert run("table", path).directory.joinpath("sequences.arrow").read_bytes() == whole


def test_result_does_not_depend_on_threads(run, write, monkeypatch):
    random = np.random.default_rng(0)
    columns = (random.integers(high, size=200_000) for high in (900, 500, 300))
    rows = "\n".join(f"u{u},i{i},{t}" for u, i, t in zip(*columns, strict=True))
    path = write("a.csv", "user_id,item_id,timestamp\n" + rows + "\n")
    contents, connect = [], prepare.connect
    for threads in (1, 4):

        def limited(*arguments, threads=threads):
            con = connect(*arguments)
            con.execute(f"SET threads = {threads}")
            return con

        monkeypatch.setattr(prepare, "connect", limited)
        directory = run("table", path, "--order", "recbole").directory
        contents.append([file.read_bytes() for file in sorted(directory.iterdir())])
    assert contents[0] == contents[1]


NO_SPACE = "Could not write file: No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        duckdb.TransactionException(f"Failed to commit: {NO_SPACE}"),
        duckdb.IOException(f"IO Error: {NO_SPACE}\nmore"),
    ],
)
def test_full_disk(run, write, monkeypatch, tmp_path, error):
    def full(*arguments, **settings):
        raise error

    monkeypatch.setattr(filters, "apply", full)
    sentence = run("table", write("a.csv", ROWS), fails=True)
    assert sentence.startswith(f"the disk that {tmp_path / 'out'} is on is full (")
    assert sentence.endswith("; make room there or choose another --out")


def test_full_disk_below_arrow(run, write, monkeypatch, tmp_path):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left")

    monkeypatch.setattr(pa.ipc, "new_file", full)
    sentence = run("table", write("a.csv", ROWS), fails=True)
    assert sentence.startswith(f"{tmp_path / 'out'} cannot be written: No space left on device;")


def test_interrupted_query(write, monkeypatch, tmp_path):
    def interrupted(*arguments, **settings):
        raise RuntimeError("Query interrupted")  # DuckDB's word for Ctrl-C

    path = write("a.csv", ROWS)
    monkeypatch.setattr(filters, "apply", interrupted)
    assert run_main(lambda: main(["table", str(path), "--out", str(tmp_path / "out")])) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


def test_parent_that_is_a_file(run, write):
    file = write("a.csv", ROWS)
    assert run("table", file, "--out", file / "out", fails=True).startswith(str(file))


def test_memory_limit(run, write):
    path = write("a.csv", ROWS)
    assert run("table", path, "--memory-limit", "200MB").n_events == 54
    expected = "--memory-limit lots is no size; write say 4GB"
    assert run("table", path, "--memory-limit", "lots", fails=True) == expected
