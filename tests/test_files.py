"""Files and folders are complete or not there at all, whatever interrupts their writing."""

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Ge
from typing_extensions import TypedDict

from tim4rec_jax import files
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_directory, atomic_write, read_json, write_json


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


def test_a_link_to_a_file_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far/file")
    write_json(tmp_path / "link", [1])
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "far" / "file").read_text()) == [1]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match="x is no file but a folder, a pipe or a device"):
        write_json(tmp_path / "x", [])
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]
    assert not (tmp_path / "x").is_file()


def test_a_file_that_looks_temporary_is_kept(tmp_path):
    mine = tmp_path / f"x.{os.getpid()}.partial"
    mine.write_text("mine")
    write_json(tmp_path / "x", [])
    assert mine.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "x", mine]


class Figures(TypedDict):
    hit: float
    users: Annotated[int, Ge(1)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"hit": 0.5, "users": 3}', None),
        (b'{"hit": 0.5}', "`users` is missing"),
        (b'{"hit": 0.5, "users": true}', "`users` should be a valid integer"),
        (b'{"hit": 0.5, "users": 0}', "`users` should be greater than or equal to 1"),
        (b'{"hit": NaN, "users": 1}', "is not valid JSON"),
        (b'{"hit": "0.5", "users": 1}', "`hit` should be a valid number"),
        (b"null", "it should be a valid dictionary"),
        (b"[" * 10**6, "recursion limit"),
        (b"", "EOF"),
        (b'{"\xff": 1}', "invalid unicode"),
        (b"9" * 10**5, "number out of range"),
    ],
)
def test_json_is_what_its_schema_says(tmp_path, content, says):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    if says is None:
        assert read_json(path, Figures, "try again") == json.loads(content)
        return
    with pytest.raises(UserError) as error:
        read_json(path, Figures, "try again")
    assert str(error.value).startswith(f"{path} is ")
    assert says in str(error.value)
    assert str(error.value).endswith("; try again")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda _: None])
def test_json_in_whose_place_is_something_else(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=r"x cannot be read \(.*\); try again"):
        read_json(tmp_path / "x", dict, "try again")


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


def test_a_copy_onto_a_full_disk_leaves_no_folder(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    with (
        pytest.raises(UserError, match="new cannot be written: No space left on device; make room"),
        atomic_directory(tmp_path / "new") as folder,
    ):
        shutil.copytree(
            tmp_path / "old",
            folder,
            copy_function=lambda *_: _refuse(errno.ENOSPC),
            dirs_exist_ok=True,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "deep" / "export"
    with atomic_directory(path) as folder:
        (folder / "old").touch()
        (folder.parent / "scratch").mkdir()
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_directory(path, ours=["old"]) as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["old"]
    with atomic_directory(path, ours=["o*"]) as folder:
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
    left = killed(tmp_path / "x", "open(folder / 'half', 'w'); open(folder.parent / 'spill', 'w')")
    assert {"x", "half", "spill"} <= {file.name for file in left.rglob("*")}
    with atomic_directory(tmp_path / "x") as folder:
        assert [file for file in left.rglob("*") if not file.name.startswith(".")] == [folder]
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def killed(path, program):
    """Kills a process in the block of `atomic_directory`; returns the hidden folder it leaves."""
    start = (
        "import os, sys; from pathlib import Path; from tim4rec_jax import files\n"
        f"with files.atomic_directory(Path({str(path)!r}), ours=['old']) as folder:\n"
    )
    lines = [*program.split("; "), "os.kill(os.getpid(), 9)"]
    code = start + "".join(f"    {line}\n" for line in lines)
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == -9
    return path.with_name(f".{path.name}.partial")


def test_what_no_run_has_made_is_never_removed(tmp_path):
    path = tmp_path / "x"
    with atomic_directory(path) as folder:
        (folder / "old").touch()
    for name in ("notes", "old.txt", "sub/old"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("mine")
        first = name.split("/")[0]
        sentence = f"x holds {first}, which this command has not made; move it away"
        with pytest.raises(UserError, match=sentence), atomic_directory(path, ours=["old"]):
            raise AssertionError
        assert (path / name).read_text() == "mine"
        shutil.rmtree(path / first) if "/" in name else (path / name).unlink()
    assert [file.name for file in path.iterdir()] == ["old"]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_a_folder_of_the_user_in_the_way_stays(tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    hidden = tmp_path / ".x.partial"
    if kind == "folder":
        (tmp_path / "mine").rename(hidden)
    elif kind == "file":
        hidden.touch()
    else:
        hidden.symlink_to("mine")
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(UserError, match=r"\.x\.partial is in the way of .*x and no run has made it"),
        atomic_directory(tmp_path / "x"),
    ):
        raise AssertionError
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_file_that_comes_late_stays(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    path = tmp_path / "x"
    with atomic_directory(path) as folder:
        (folder / "old").touch()
    with atomic_directory(path, ours=["old"]) as folder:
        (folder / "new").touch()
        (path / "notes").touch()
    assert sorted(file.name for file in path.iterdir()) == ["new", "notes"]
    assert list(tmp_path.iterdir()) == [path]


def test_two_folders_change_places_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("needs renameat2 of Linux")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()


def test_without_that_step_a_killed_process_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x"
    with atomic_directory(path) as folder:
        (folder / "old").touch()
    # It is killed between the two renames.
    killed(path, "os.rename(folder.parent.parent / 'x', folder.parent / 'replaced')")
    assert not path.exists()
    with pytest.raises(RuntimeError), atomic_directory(path, ours=["old"]):
        assert (path / "old").exists()
        raise RuntimeError
    assert (path / "old").exists()
    # And the second rename fails, for whatever reason.
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with pytest.raises(UserError), atomic_directory(path, ours=["old"]) as folder:
        monkeypatch.setattr(Path, "rename", fails_for(folder, Path.rename))
    assert (path / "old").exists()


def fails_for(folder, rename):
    calls = []

    def renamed(one, other):
        calls.append(one)
        if one == folder and calls.count(folder) == 2:
            _refuse(errno.EACCES)
        return rename(one, other)

    return renamed


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "x").symlink_to("real")
    with atomic_directory(tmp_path / "x") as folder:
        (folder / "new").touch()
    assert (tmp_path / "x").is_symlink() and (tmp_path / "real" / "new").exists()


def test_the_top_of_a_file_system_is_refused():
    with pytest.raises(UserError, match="top of a file system"), atomic_directory(Path("/")):
        raise AssertionError


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="x cannot be written: Not a directory"),
        atomic_directory(tmp_path / "file" / "x"),
    ):
        raise AssertionError


@pytest.mark.parametrize("command", ["tim4rec_jax.interop", "tim4rec_jax.serving"])
def test_an_empty_folder_is_refused(command, monkeypatch, capsys):
    words = {"tim4rec_jax.interop": ["x.pth"], "tim4rec_jax.serving": ["recommend"]}[command]
    monkeypatch.setattr("sys.argv", [command, *words, "--workdir", ""])
    with pytest.raises(UserError) as error:
        importlib.import_module(f"{command}.__main__").main()
    assert "it is empty; name a folder" in str(error.value)
