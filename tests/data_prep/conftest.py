"""Runs `python -m data_prep` in this process, on files that tests write."""

import gzip

import pytest

from tim4rec_jax.data import open_dataset
from tim4rec_jax.data_prep.__main__ import main
from tim4rec_jax.errors import run_main


@pytest.fixture
def run(tmp_path, capsys):
    """Prepares `tmp_path / "out"`; returns the dataset, or the sentence of its `fails=True`."""

    def run(*arguments, fails=False):
        arguments = [str(argument) for argument in arguments]
        if "--out" not in arguments:
            arguments += ["--out", str(tmp_path / "out"), "--overwrite"]
        capsys.readouterr()
        code = run_main(lambda: main(arguments))
        captured = capsys.readouterr()
        if fails:
            assert code == 1
            assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
            assert not list(tmp_path.glob(".*.partial")), "something is left behind"
            return captured.err.removeprefix("error: ").strip()
        assert code == 0, captured.err
        return open_dataset(arguments[arguments.index("--out") + 1])

    return run


@pytest.fixture
def write(tmp_path):
    """Writes text or bytes to a file, compressed where its name ends in .gz; returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.fixture
def histories():
    """Reads a dataset back: user id -> [(item id, time), ...], all in their order on disk."""

    def histories(ds):
        items = ds.item_ids.to_pylist()
        result = {}
        for row, user in enumerate(ds.user_ids.to_pylist()):
            start, length = ds.offsets[row : row + 1], ds.lengths[row : row + 1]
            indices = ds.items(start, length, int(length[0]))[0]
            times = ds.timestamps(start, length, int(length[0]))[0].tolist()
            result[user] = [(items[i - 1], t) for i, t in zip(indices, times, strict=True)]
        return result

    return histories
