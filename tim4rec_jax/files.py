"""Files and folders that are complete, or not there at all."""

from __future__ import annotations

import argparse
import ctypes
import errno
import fcntl
import fnmatch
import functools
import itertools
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from tim4rec_jax.errors import UserError


def named_folder(text: str) -> Path:
    """A folder on the command line, as a type of `argparse`; "" would be the current one."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder")
    return Path(text)


def named_file(text: str) -> Path:
    """A file to write on the command line, as a type of `argparse`."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, not a file")
    return path


def positive_count(text: str) -> int:
    """A number of things to do on the command line, as a type of `argparse`."""
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 10000")
    return int(text)


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses into an error that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


# Files of settings and figures are much smaller. What is larger is none of ours.
_LARGEST_JSON = 1 << 26


def read_json(path: Path, schema: Any, remedy: str) -> Any:
    """Reads a JSON file, whatever somebody has put in its place.

    Args:
      path: the file.
      schema: the type of what the file must hold, of those that pydantic knows: `dict[str, float]`,
        or a `TypedDict`. Numbers must be finite, and nothing is converted.
      remedy: what the user can do about a file that is missing or damaged.

    Returns:
      The content.

    Raises:
      UserError: the file is missing, no JSON, or not what the schema says. The message names the
        file, what is wrong and the remedy.
    """
    from pydantic_core import from_json  # late, because it takes long to import

    try:
        content = read_regular(path, _LARGEST_JSON)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {remedy}") from error
    return check_schema(values, schema, path, remedy)


def check_schema(values: Any, schema: Any, path: Path, remedy: str) -> Any:
    """Makes sure that values are what a type says; arguments and errors are those of `read_json`.

    Args:
      values: what the file `path` holds.
      schema: see `read_json`.
      path: see `read_json`.
      remedy: see `read_json`.
    """
    from pydantic import ValidationError  # late, because it takes long to import

    try:
        return _validator(schema).validate_python(values, strict=True)
    except ValidationError as errors:
        first = errors.errors(include_url=False, include_context=False, include_input=False)[0]
        place = f"`{'.'.join(map(str, first['loc']))}`" if first["loc"] else "it"
        message = first["msg"].removeprefix("Input ")
        what = f"{place} is missing" if first["type"] == "missing" else f"{place} {message}"
        raise UserError(f"{path} is damaged ({what}); {remedy}") from errors


@functools.cache
def _validator(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def read_regular(path: Path, most: int) -> bytes:
    """Reads a file that must be a plain one: neither a folder nor a pipe that nobody writes to.

    Args:
      path: the file; a link to a file will do.
      most: the largest size in bytes.

    Raises:
      OSError: the file is missing, no plain file, or too large.
    """

    def without_waiting(name: str, flags: int) -> int:  # for somebody who writes to a pipe
        return os.open(name, flags | os.O_NONBLOCK)

    with open(path, "rb", opener=without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most:,} bytes", str(path))
        return file.read(most)


def check_file(path: Path, remedy: str, note: str = "") -> None:
    """Makes sure that a file is there, and no folder, nor a pipe that a reader would wait for.

    Args:
      path: the file.
      remedy: what the user can do otherwise.
      note: what there is to say about the file, in brackets.

    Raises:
      UserError: it is not.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "is missing"
        raise UserError(f"{path} {what}{note and f' ({note})'}; {remedy}")


def check_plain(folder: Path) -> None:
    """Makes sure that a folder holds files and folders only; a library would wait for a pipe.

    Raises:
      UserError: it holds something else, or a link that leads nowhere; the message names it.
    """
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path.relative_to(folder)} is neither a file nor a folder")


@contextmanager
def table_writer(path: Path, schema: Any) -> Iterator[Any]:
    """Opens a table that is written part by part: CSV if its name ends in `.csv`, else Parquet.

    Args:
      path: the file to write or to replace; see `atomic_write`.
      schema: its columns, as Arrow has them.

    Yields:
      What has the method `write_table`.

    Raises:
      UserError: as for `atomic_write`.
    """
    from pyarrow import csv, parquet

    kind = csv.CSVWriter if path.suffix.lower() == ".csv" else parquet.ParquetWriter
    with atomic_write(path) as file, kind(file, schema) as writer:
        yield writer


@contextmanager
def atomic_write(path: Path, mode: Literal["wb", "w"] = "wb") -> Iterator[IO[Any]]:
    """Opens a temporary file beside `path`, which takes the place of `path` when the block ends.

    The content is on the disk before the file gets its name. If the block raises, the temporary
    file is removed and `path` stays as it was. A link stays, and the file that it leads to is
    replaced.

    Args:
      path: the file to write or to replace.
      mode: "wb" for bytes, "w" for text in UTF-8.

    Yields:
      The open temporary file.

    Raises:
      UserError: the file cannot be written (full disk, no permission, no such folder), or a folder,
        a pipe or a device has its name.
    """
    if "\0" in str(path):
        raise UserError(f"{path} cannot be written: it holds a null byte; choose another name")
    with _one_sentence(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise UserError(f"{path} is no file but a folder, a pipe or a device; name another")
        file = _new_file_beside(target, mode)
        partial = Path(file.name)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def _new_file_beside(path: Path, mode: Literal["wb", "w"]) -> IO[Any]:
    """Opens a new file with a name like that of `path`, which no other process has."""
    for number in itertools.count():
        partial = path.with_name(f"{path.name}.{os.getpid() + number}.partial")
        with suppress(FileExistsError):
            return partial.open(mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8")
    raise AssertionError  # there is always another number


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file, complete or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    with atomic_write(path, "w") as file:
        file.write(json.dumps(values, indent=2) + "\n")


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk and a quota say


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that a disk or a quota has no room left.

    DuckDB and `shutil.copytree` give no number. The last text is of what DuckDB moves to the disk.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in NO_ROOM
    texts = ("No space left", "File too large", "quota", "max_temp_directory_size")
    return any(text in str(error) for text in texts)


# Lies in each folder that `atomic_directory` works in. A folder without it is of the user.
_MARK = ".made-by-tim4rec-jax"
_REPLACED = "replaced"
_RENAME_EXCHANGE = 2  # of linux/fs.h


@contextmanager
def atomic_directory(path: Path, *, ours: Iterable[str] = ()) -> Iterator[Path]:
    """Gives an empty folder, which takes the place of `path` when the block ends.

    The empty folder lies in a hidden folder beside `path`, which bears a mark. The block may keep
    temporary files in the hidden folder, because that is removed at the end. If the block raises,
    `path` stays as it was. What a killed process leaves behind is cleared by the next call for the
    same `path`. An old folder and the new one change places in one step of the file system, so
    that a complete folder is there at each moment.

    Nothing is removed but files that the program has made. If `path` holds anything else, it is
    refused. A file that somebody puts there later, while the block runs, moves to the new folder.

    Args:
      path: the folder to write. Missing parents are made. It may exist if it is empty or holds
        nothing but files of `ours`. A link to a folder stays, and that folder is written.
      ours: names (globs) of the files that the program makes, and that a new folder may replace.

    Yields:
      The empty folder; its parent is the hidden one.

    Raises:
      UserError: another process is writing `path`, `path` holds files that are not `ours`, the
        folder cannot be made, or the block ended because the disk is full.
    """
    ours = tuple(ours)
    if "\0" in str(path):
        raise UserError(f"{path} cannot be written: it holds a null byte; choose another name")
    with _one_sentence(path):
        target = Path(os.path.realpath(path))
        if target.parent == target or os.path.ismount(target):
            raise UserError(f"{path} is the top of a file system; choose a folder inside it")
        missing = [parent for parent in target.parents if not parent.exists()]
        hidden = target.with_name(f".{target.name}.partial")
        lock = _claim(hidden, path)
    folder = hidden / target.name
    try:
        with _one_sentence(path):
            _restore(hidden, target)
            if foreign := _foreign(target, ours):
                raise UserError(
                    f"{path} holds {foreign[0].name}, which this command has not made; move it "
                    "away or choose another folder"
                )
            _clear(hidden)
            folder.mkdir()
        try:
            yield folder
        except OSError as error:
            if is_full_disk(error):
                # The libraries that write name no file, or one in the hidden folder.
                raise UserError(
                    f"{path} cannot be written: {os.strerror(error.errno or errno.ENOSPC)}; make "
                    "room there or choose another folder"
                ) from error
            raise
        with _one_sentence(path):
            _flush(folder)
            _put(folder, target, hidden / _REPLACED)
            for old in (folder, hidden / _REPLACED):
                for file in _foreign(old, ours):
                    file.rename(target / file.name)
    finally:
        with suppress(OSError):
            _restore(hidden, target)
            _clear(hidden)
            (hidden / _MARK).unlink()
            hidden.rmdir()
        os.close(lock)
        with suppress(OSError):  # those that hold something stay
            for parent in missing:
                parent.rmdir()


def _claim(hidden: Path, path: Path) -> int:
    """Makes, marks and locks the hidden folder; returns the descriptor that holds the lock."""
    in_the_way = UserError(f"{hidden} is in the way of {path} and no run has made it; rename it")
    while True:
        if hidden.is_symlink() or (hidden.exists() and not hidden.is_dir()):
            raise in_the_way
        hidden.mkdir(parents=True, exist_ok=True)
        lock = os.open(hidden, os.O_RDONLY)
        try:
            # The system releases the lock when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A process that has just ended may have removed the folder that we locked.
            if hidden.exists() and os.path.samestat(os.fstat(lock), hidden.stat()):
                if any(hidden.iterdir()) and not (hidden / _MARK).is_file():
                    raise in_the_way
                (hidden / _MARK).touch()
                return lock
        except BlockingIOError as error:
            os.close(lock)
            raise UserError(f"another run is writing {path}; wait for it") from error
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _foreign(folder: Path, ours: tuple[str, ...]) -> list[Path]:
    """Returns what lies in a folder and is not a file of `ours`."""
    return [
        entry
        for entry in (sorted(folder.iterdir()) if folder.exists() else ())
        if entry.is_symlink()
        or not entry.is_file()
        or not any(fnmatch.fnmatchcase(entry.name, name) for name in ours)
    ]


def _clear(hidden: Path) -> None:
    """Empties the hidden folder but for its mark."""
    for left in hidden.iterdir():
        if left.name != _MARK:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _flush(folder: Path) -> None:
    """Waits until all that a folder holds is on the disk."""
    for path in (*folder.rglob("*"), folder):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _put(folder: Path, target: Path, replaced: Path) -> None:
    """Gives `folder` the name `target`; what had the name lies in `folder` or `replaced` then."""
    try:
        folder.rename(target)  # an empty folder may be there
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(folder, target):
            # Should the process be killed between these two, the next call takes the first back.
            target.rename(replaced)
            folder.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Lets two folders change their names in one step, if the system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here = -100  # AT_FDCWD: paths are as they are
    names = os.fsencode(one), os.fsencode(other)
    if not rename(here, names[0], here, names[1], ctypes.c_uint(_RENAME_EXCHANGE)):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):  # this file system cannot
        return False
    raise OSError(number, os.strerror(number))


def _restore(hidden: Path, target: Path) -> None:
    """Takes back the first of the two renames of `_put`."""
    replaced = hidden / _REPLACED
    if replaced.exists() and not target.exists():
        replaced.rename(target)
