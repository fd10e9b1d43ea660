"""Files and folders that are complete, or not there at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from tim4rec_jax.errors import UserError


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into an error that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`, which takes the place of `path` when the block ends.

    The content is on the disk before the file gets its name. If the block raises, the temporary
    file is removed and `path` stays as it was.

    Args:
      path: the file to write or to replace.
      mode: "wb" for bytes, "w" for text in UTF-8.

    Yields:
      The open temporary file.

    Raises:
      UserError: the file cannot be written (full disk, no permission, no such folder).
    """
    # Two processes that write the same file do not share a temporary file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with _one_sentence(path):
        file = partial.open(mode, encoding=None if "b" in mode else "utf-8")
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, complete or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    with atomic_write(path, "w") as file:
        file.write(json.dumps(values, indent=2) + "\n")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Gives an empty folder, which takes the place of `path` when the block ends.

    The empty folder lies in a hidden folder beside `path`. The block may keep temporary files in
    the hidden folder, because that is removed at the end. If the block raises, `path` stays as it
    was. What a killed process leaves behind is cleared by the next call for the same `path`.

    Args:
      path: the folder to write. Missing parents are made, and a folder that is there is replaced.

    Yields:
      The empty folder; its parent is the hidden one.

    Raises:
      UserError: another process is writing `path`, or the folder cannot be made.
    """
    path = path.absolute()
    missing = [parent for parent in path.parents if not parent.exists()]
    hidden = path.with_name(f".{path.name}.partial")
    folder = hidden / path.name
    with _one_sentence(path):
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY)
    try:
        # The system releases the lock when the process ends, however it ends.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"another run is writing {path}; wait for it") from error
    try:
        with _one_sentence(path):
            for left in hidden.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            folder.mkdir()
        yield folder
        with _one_sentence(path):
            if path.exists():
                path.rename(hidden / "replaced")
            folder.rename(path)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(lock)
        with suppress(OSError):  # those that hold something stay
            for parent in missing:
                parent.rmdir()
