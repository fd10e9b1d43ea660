"""Files and folders are complete or not there at all, whatever interrupts their writing."""

import errno
import json
import os

import pytest

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_directory, atomic_write, write_json


@pytest.mark.parametrize(("mode", "content"), [("wb", b"new"), ("w", "new")])
def test_a_file_is_replaced_only_when_complete(tmp_path, mode, content):
    path = tmp_path / "figures"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path, mode) as file:
        file.write(content)
        raise RuntimeError
    assert path.read_text() == "old"
    with atomic_write(path, mode) as file:
        file.write(content)
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_no_such_folder(tmp_path):
    path = tmp_path / "nowhere" / "x"
    with pytest.raises(UserError, match="x cannot be written: No such file"), atomic_write(path):
        raise AssertionError


def test_no_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: _refuse(errno.EACCES))
    with pytest.raises(UserError, match="x cannot be written: Permission denied"):
        write_json(tmp_path / "x", {})


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_json(path, {"hit@10": 0.25})
    monkeypatch.setattr(os, "fsync", lambda _: _refuse(errno.ENOSPC))
    with pytest.raises(UserError) as error:
        write_json(path, {"hit@10": 0.5})
    assert str(error.value) == f"{path} cannot be written: No space left on device"
    assert json.loads(path.read_text()) == {"hit@10": 0.25}
    assert list(tmp_path.iterdir()) == [path]


def _refuse(number):
    raise OSError(number, os.strerror(number))


def test_a_folder_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "deep" / "export"
    with atomic_directory(path) as folder:
        (folder / "old").touch()
        (folder.parent / "scratch").mkdir()
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_directory(path) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["old"]
    with atomic_directory(path) as folder:
        (folder / "new").touch()
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_no_parents(tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "here" / "deep" / "x"):
        raise RuntimeError
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_one_run_at_a_time_writes_a_folder(tmp_path):
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "mine").touch()
        with (
            pytest.raises(UserError, match=r"another run is writing .*x; wait for it"),
            atomic_directory(tmp_path / "x"),
        ):
            raise AssertionError
    assert (tmp_path / "x" / "mine").exists()


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / ".x.partial" / "x").mkdir(parents=True)
    (tmp_path / ".x.partial" / "x" / "half").touch()
    (tmp_path / ".x.partial" / "spill").touch()
    with atomic_directory(tmp_path / "x") as folder:
        assert list(folder.parent.rglob("*")) == [folder]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="x cannot be written: Not a directory"),
        atomic_directory(tmp_path / "file" / "x"),
    ):
        raise AssertionError
