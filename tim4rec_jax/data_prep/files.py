"""Finds the source files in what the user names, and opens them.

The user may name a file, a glob, a folder, a zip or a tar archive. Each file may be plain or gzip,
whatever its name is.
"""

import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import io
import os
import stat
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePath

import pyarrow as pa

from tim4rec_jax.data_prep import archives
from tim4rec_jax.errors import UserError

GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)
_LONGEST_FIRST_LINE = 1 << 20  # bytes
# What files begin with that are neither text nor gzip nor Parquet, and what to do with them.
_OTHERS = {
    b"\xff\xfe\x00\x00": "is UTF-32 text; convert it with `iconv -f UTF-32 -t UTF-8`",
    b"\xff\xfe": "is UTF-16 text; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "is UTF-16 text; convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\x00\x00\xfe\xff": "is UTF-32 text; convert it with `iconv -f UTF-32 -t UTF-8`",
    b"BZh": "is packed with bzip2; unpack it with `bunzip2`",
    b"\xfd7zXZ": "is packed with xz; unpack it with `unxz`",
    b"\x28\xb5\x2f\xfd": "is packed with zstd; unpack it with `unzstd`",
    b"\x1f\x8b": "is packed with gzip twice; unpack it with `gunzip`",
    b"PAR1": "is a Parquet file, perhaps in gzip; unpack it and read it with `data_prep table`",
    b"PK\x03\x04": "is a damaged zip archive, or one inside another; unpack it with `unzip`",
}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file with events, or a table in memory.

    Attributes:
      name: what messages call it: the path as given, and then the member for one of an archive.
      path: where it is on the disk; members of archives are unpacked. Unused for a table.
      table: the table; None for a file.
    """

    name: str
    path: Path = Path()
    table: pa.Table | None = None

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Found:
    """The files that `find_files` found.

    Attributes:
      events: the files with events, in the order in which they are read.
      titles: the files with titles of items.
      left_out: for each folder or archive, the names of the files that are not read.
    """

    events: list[SourceFile]
    titles: list[SourceFile]
    left_out: dict[str, list[str]]


def find_files(
    patterns: Sequence[str], members: tuple[str, ...], titles: tuple[str, ...], work: Path
) -> Found:
    """Finds the files to read: expands globs, searches folders, unpacks archives.

    Args:
      patterns: paths or globs; several files are read in this order. What exists under such a
        name is meant literally.
      members: names (globs in lower case, without .gz; several with `|` between them) of the files
        to take from a folder or an archive. The first entry that matches a file is used.
      titles: likewise, of the files with titles.
      work: where members of archives are unpacked.

    Raises:
      UserError: there is no such file, none of `members` inside, one file is named twice, or a file
        cannot be read: it is empty, damaged, too large, or something else than a file.
    """
    found, seen = Found([], [], {}), {}
    for pattern in patterns:
        exists = os.path.lexists(pattern)
        paths = [Path(pattern)] if exists else sorted(map(Path, glob.glob(pattern)))
        if not paths:
            name = pattern or "the empty name"
            raise UserError(f"{name}: no such file; check the path given as --source")
        for path in paths:
            _look_into(path, members, titles, work, found, seen)
    return found


def _look_into(
    path: Path,
    members: tuple[str, ...],
    titles: tuple[str, ...],
    work: Path,
    found: Found,
    seen: dict[tuple[int, int], Path],
) -> None:
    """Adds a file, or what is wanted of a folder or an archive, to `found`.

    `seen` has the files and archives so far, by what a file system knows them by.
    """
    if path.is_dir():
        inside = {os.path.relpath(file, path): file for file in _walk(path)}
        events, others = (_wanted(list(inside), names) for names in (members, titles))
        for names, files in ((events, found.events), (others, found.titles)):
            for name in names:
                check_readable(inside[name], str(inside[name]))
                if files is found.events:
                    _refuse_twice(inside[name], seen)
                files.append(SourceFile(str(inside[name]), inside[name]))
    else:
        check_readable(path, str(path))
        _refuse_twice(path, seen)
        with archives.opened(path) as archive:
            if archive is None:
                found.events.append(SourceFile(str(path), path))
                return
            inside = archive.members
            events, others = (_wanted(list(inside), names) for names in (members, titles))
            unpacked = archive.unpack([*events, *others], work)
        files = [SourceFile(f"{path}/{name}", unpacked[name]) for name in (*events, *others)]
        for file in files:
            if not file.path.stat().st_size:
                raise _is_empty(file.name)
        found.events.extend(files[: len(events)])
        found.titles.extend(files[len(events) :])
    if not events:
        wanted = " or ".join(members).replace("|", " or ") or "anything"
        raise UserError(f"{path} holds no file called {wanted}; pass the file itself as --source")
    if left_out := sorted(set(inside) - {*events, *others}):
        found.left_out[str(path)] = left_out


def _refuse_twice(path: Path, seen: dict[tuple[int, int], Path]) -> None:
    """Notes a file, and refuses one that is there already, also under another name."""
    status = path.stat()
    key = (status.st_dev, status.st_ino)
    if key in seen:
        raise UserError(
            f"{path} and {seen[key]} are the same file, which would count twice; name it once"
        )
    seen[key] = path


def _walk(folder: Path) -> list[Path]:
    """Returns all that is in a folder and its folders, and fails where it cannot look into one."""

    def fail(error: OSError):
        raise error

    entries = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        linked = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        entries += [Path(parent, name) for name in (*files, *linked)]
    return sorted(entries)


def _wanted(names: list[str], members: tuple[str, ...]) -> list[str]:
    """Returns the names that match the first of `members` that any name matches."""
    for member in members:
        wanted = [
            name
            for name in names
            if not _is_hidden(name)
            and any(
                fnmatch.fnmatchcase(PurePath(name).name.lower().removesuffix(".gz"), one)
                for one in member.split("|")
            )
        ]
        if wanted:
            return wanted
    return []


def _is_hidden(name: str) -> bool:
    """Tells what other programs leave beside files, such as `__MACOSX/._events.csv`.

    The folder `.ipynb_checkpoints` holds copies of the files that Jupyter has shown.
    """
    parts = PurePath(name).parts
    return "__MACOSX" in parts or any(part.startswith(".") and part != ".." for part in parts)


def check_readable(path: Path, name: str) -> None:
    """Checks that a path is a file that is not empty and may be read.

    Raises:
      UserError: it is something else, such as a pipe, which could be waited for without end.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} has a name that is no UTF-8; rename it") from error
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(
                f"{name} is no file but a folder, pipe, device or socket; write what it gives to "
                "a file first"
            )
        path.open("rb").close()
    except OSError as error:
        raise UserError(
            f"{name} cannot be read: {error.strerror}; correct the path or its permissions"
        ) from error
    if not status.st_size:
        raise _is_empty(name)


def _is_empty(name: str) -> UserError:
    return UserError(f"{name} is empty; check that it is complete")


def is_gzip(path: Path) -> bool:
    """Tells from the first bytes whether a file is gzip, because names are not reliable."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_bytes(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """Opens a plain or gzip file."""
    return gzip.GzipFile(path) if is_gzip(path) else open(path, "rb")


def open_text(path: Path) -> io.TextIOWrapper:
    """Opens a plain or gzip file; bytes that are no UTF-8 become a placeholder."""
    return io.TextIOWrapper(open_bytes(path), "utf-8-sig", "replace", newline="")


def first_line(file: SourceFile) -> str:
    """Returns the first line without its end.

    Raises:
      UserError: the file is empty, a damaged gzip file or no text, or the line has no end.
    """
    try:
        with open_bytes(file.path) as content:
            start = content.read(_LONGEST_FIRST_LINE)
    except GZIP_ERRORS as error:
        raise damaged_gzip(file) from error
    for magic, problem in _OTHERS.items():
        if start.startswith(magic):
            raise UserError(f"{file} {problem}")
    line = (start.splitlines() or [b""])[0]
    if b"\0" in line:
        raise UserError(f"{file}, line 1: not a text, it holds null bytes; check what file it is")
    if len(line) == _LONGEST_FIRST_LINE:
        raise UserError(
            f"{file}, line 1: longer than a million bytes; write each event on a line of its own"
        )
    if not line.strip():
        raise UserError(f"{file} is empty or starts with an empty line; check that it is complete")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}, line 1: the line holds bytes that are no UTF-8; convert the file with `iconv`"
        ) from error


def damaged_gzip(file: SourceFile) -> UserError:
    """Returns the error for a gzip file that ends too early or fails its checksum."""
    return UserError(f"{file} is a truncated or damaged gzip file; fetch it again")


def fingerprint(file: SourceFile, stop: threading.Event | None = None) -> dict:
    """Returns the name, the size in bytes and the SHA-256 of a file, for dataset.json.

    Args:
      file: the file or table.
      stop: ends the reading early once it is set, with a digest of no meaning; None: never.

    Raises:
      UserError: a gzip file ends too early or fails its checksum, which DuckDB does not check.
    """
    if file.table is not None:
        return {"file": file.name, "bytes": file.table.nbytes}
    stop, digest = stop or threading.Event(), hashlib.sha256()
    with open(file.path, "rb") as content:
        while (block := content.read(1 << 20)) and not stop.is_set():
            digest.update(block)
    if is_gzip(file.path):
        try:
            with gzip.open(file.path) as content:
                while content.read(1 << 20) and not stop.is_set():
                    pass
        except GZIP_ERRORS as error:
            raise damaged_gzip(file) from error
    name = PurePath(file.name).name
    return {"file": name, "bytes": file.path.stat().st_size, "sha256": digest.hexdigest()}
