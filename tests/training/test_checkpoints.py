"""Checkpoints: what is damaged is passed over, what is half-written goes."""

import errno
import os
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests.training.tiny_run import iterator, state
from tim4rec_jax import item_rows
from tim4rec_jax.errors import UserError
from tim4rec_jax.training import checkpoints as checkpoints_module
from tim4rec_jax.training.checkpoints import Checkpoints, read_state


def save(workdir, *steps):
    checkpoints = Checkpoints(workdir)
    for step in steps:
        checkpoints.save(state(step, 2 * step), iterator(step), {"epoch": step})
        checkpoints.save_best(step, state(step, 2 * step).params)
    checkpoints.close()


def restore(workdir):
    """Step, progress and position in the data of what is restored; checks every value."""
    data = iterator(0)
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore(state(0, -1), data)
    checkpoints.close()
    if restored is None:
        return None
    found, progress = restored
    step = int(found.step)
    expected = state(step, 2 * step)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(ours.dtype, jax.dtypes.prng_key):
            ours, theirs = jax.random.key_data(ours), jax.random.key_data(theirs)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(next(data)["items"], next(iterator(step))["items"])
    return step, progress["epoch"]


def names(folder):
    return {path.name for path in folder.iterdir()}


def truncate(folder):
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder):
    """Changes bits in the largest file, which holds the arrays."""
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(content)


def test_nothing_there(tmp_path):
    assert restore(tmp_path) is None


def test_the_last_two_states_and_the_best_parameters_are_kept(tmp_path):
    save(tmp_path, 3, 5, 8)
    assert names(tmp_path / "checkpoints") == {"5", "8"}
    assert names(tmp_path / "best") == {"8"}
    assert restore(tmp_path) == (8, 8)


def replace(name, before, after):
    """Changes a file so that it can be read as well as before."""

    def damage(folder):
        content = (folder / name).read_text()
        assert content.count(before) == 1
        (folder / name).write_text(content.replace(before, after))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lambda folder: shutil.rmtree(folder / "state"),
        replace("data/process_0-of-1.json", "8", "9"),
        replace("progress/metadata", "8", "9"),
    ],
    ids=["truncated", "flipped", "half deleted", "another place in the data", "another progress"],
)
def test_damage_is_passed_over_with_a_word(tmp_path, capsys, damage):
    save(tmp_path, 5, 8)
    damage(tmp_path / "checkpoints" / "8")
    assert restore(tmp_path) == (5, 5)
    said = capsys.readouterr().out
    assert f"checkpoint {tmp_path / 'checkpoints' / '8'} is damaged, passing over it" in said
    # The next checkpoints take the place of the damaged one.
    save(tmp_path, 6, 8)
    assert restore(tmp_path) == (8, 8)


def read_error(number):
    """As a reader of JSON tells what the system has said."""
    error = UserError("digests/arrays.json cannot be read")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "the memory does not suffice"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "the memory does not suffice"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (read_error(errno.EACCES), "Permission denied"),
        (ValueError("UNKNOWN: Error [os_error_code='116' x='2']"), os.strerror(116)),
        (OSError(errno.ENOENT, "No such file"), None),
        (read_error(errno.EISDIR), None),
        (FileNotFoundError("Checkpoint not found."), None),
        (ValueError("NOT_FOUND: Error [os_error_code='2']"), None),
        (ValueError("DATA_LOSS: checksum"), None),
    ],
)
def test_what_the_system_refuses_is_no_damage(error, reason):
    assert checkpoints_module._refusal(error) == reason


def test_a_checkpoint_that_cannot_be_read_now_stays(tmp_path, monkeypatch):
    """It may be whole, and would be deleted as one that is damaged."""
    save(tmp_path, 5, 8)

    def full(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "_read", full)
        with pytest.raises(UserError, match=r"checkpoints/8 cannot be read \(the memory does not"):
            restore(tmp_path)
        with pytest.raises(UserError, match=r"checkpoints/8 cannot be read \(the memory does not"):
            read_state(tmp_path, state(0, -1))
        checkpoints = Checkpoints(tmp_path)
        with pytest.raises(UserError, match=r"best/8 cannot be read \(the memory.*put that right"):
            checkpoints.restore_best(state(0, -1).params)
        checkpoints.close()
    assert names(tmp_path / "checkpoints") == {"5", "8"}
    assert restore(tmp_path) == (8, 8)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "write failed: No space left on device"),
        ValueError("UNKNOWN: Error writing file: No space left on device [os_error_code='28']"),
    ],
    ids=["of the system", "of Tensorstore"],
)
def test_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch, error):
    save(tmp_path, 5)

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        message = rf"cannot be written to {tmp_path} \(No space left on device\); the one before"
        with pytest.raises(UserError, match=message):
            save(tmp_path, 8)
    assert restore(tmp_path) == (5, 5)


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise ValueError("another: cause")

    monkeypatch.setattr(ocp.CheckpointManager, "save", wrong)
    with pytest.raises(ValueError, match="another: cause"):
        save(tmp_path, 8)


def test_nothing_readable_left(tmp_path):
    save(tmp_path, 5, 8)
    for step in ("5", "8"):
        truncate(tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match="can be read; delete the run"):
        restore(tmp_path)
    assert names(tmp_path / "checkpoints") == {"5", "8"}


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((384, 8), (128, 8)),  # 12,288 bytes, of which at most 4,096 make a part
        ((257, 8), (257, 1)),  # a prime number of rows is cut into columns
        ((1543,), (1543,)),
        ((16, 8), (16, 8)),
    ],
)
def test_large_arrays_are_written_in_parts(tmp_path, monkeypatch, shape, parts):
    monkeypatch.setattr(checkpoints_module, "_PART", 4096)
    array = jax.numpy.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    params = nnx.State({"kernel": nnx.Param(array)})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(1, params)
    checkpoints.close()
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(tmp_path / "best" / "1" / "default").item_metadata["kernel"]
    assert saved.storage.chunk_shape == parts
    again = Checkpoints(tmp_path)
    found = nnx.to_pure_dict(again.restore_best(params))
    again.close()
    np.testing.assert_array_equal(found["kernel"], array)


def test_a_run_begins_with_tables_that_were_spread_over_devices(tmp_path):
    names, mine = ("kernel",), state(5, 7)
    spread = mine.replace(
        params=item_rows.completed(mine.params, names, 4),
        opt_state=item_rows.completed(mine.opt_state, names, 4),
    )
    assert spread.params["kernel"].shape == (4, 5)
    checkpoints = Checkpoints(tmp_path, mine, names)
    checkpoints.save(spread, iterator(5), {})
    checkpoints.close()
    found = read_state(tmp_path, mine, names)
    assert found is not None
    for ours, theirs in zip(
        jax.tree.leaves(found.params), jax.tree.leaves(mine.params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_half_written_checkpoints_are_removed(tmp_path):
    save(tmp_path, 5)
    for folder in (tmp_path / "checkpoints", tmp_path / "best"):
        shutil.copytree(folder / "5", folder / "7.orbax-checkpoint-tmp")
        truncate(folder / "7.orbax-checkpoint-tmp")
    assert restore(tmp_path) == (5, 5)
    deadline = time.monotonic() + 20  # Orbax removes them in the background
    while time.monotonic() < deadline and list(tmp_path.glob("*/*-tmp")):
        time.sleep(0.01)
    assert names(tmp_path / "checkpoints") == names(tmp_path / "best") == {"5"}


@pytest.mark.parametrize("content", [None, "[]", "[" * 50_000], ids=["pipe", "list", "deep"])
def test_a_description_that_is_none(tmp_path, content):
    save(tmp_path, 5, 8)
    description = tmp_path / "checkpoints" / "5" / "_CHECKPOINT_METADATA"
    description.unlink()
    if content is None:
        os.mkfifo(description)  # for which Orbax would wait
    else:
        description.write_text(content)
    message = rf"^{tmp_path / 'checkpoints'} holds a damaged checkpoint \(.*\): remove it, or"
    with pytest.raises(UserError, match=message):
        restore(tmp_path)
