"""Finds the source files in what the user names, and opens them.

The user may name a file, a glob, a folder, a zip or a tar archive. Each file may be plain or gzip,
whatever its name is.
"""

import glob
import gzip
import hashlib
import io
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from tim4rec_jax.errors import UserError


def find_files(patterns: list[str], members: tuple[str, ...], work: Path) -> list[Path]:
    """Returns the files to read: globs expanded, folders searched, archives unpacked.

    Args:
      patterns: paths or globs; several files are read in this order.
      members: names (globs, without .gz) of the files to take from a folder or an archive. The
        first name that matches a file is used.
      work: where members of archives are unpacked.

    Raises:
      UserError: there is no such file, none of `members` inside, or the archive is damaged.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
        if not found:
            raise UserError(f"{pattern}: no such file; check the path given as --source")
        for path in found:
            try:
                inside = _inside(path, members, work)
            except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
                raise UserError(f"{path} is a damaged archive; fetch it again") from error
            if not inside:
                raise UserError(
                    f"{path} holds no file called {' or '.join(members) or 'anything'}; pass the "
                    "file itself as --source"
                )
            files += inside
    return files


def find_beside(patterns: list[str], members: tuple[str, ...], work: Path) -> list[Path]:
    """Returns files that lie beside the events in the same folder or archive.

    The arguments are those of `find_files`.
    """
    containers = [Path(pattern) for pattern in patterns if Path(pattern).exists()]
    return [
        file
        for path in containers
        for file in _inside(path, members, work)
        if file != path  # the file with the events itself
    ]


def _inside(path: Path, members: tuple[str, ...], work: Path) -> list[Path]:
    if path.is_dir():
        candidates = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return _wanted(candidates, members)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            wanted = _wanted([Path(name) for name in archive.namelist()], members)
            return [_unpack(archive.open(str(name)), work / name.name) for name in wanted]
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        with tarfile.open(path) as archive:
            return list(_untar(archive, members, work))
    return [path]


def _wanted(candidates: list[Path], members: tuple[str, ...]) -> list[Path]:
    for member in members:
        plain = [(path.with_name(path.name.removesuffix(".gz")), path) for path in candidates]
        if wanted := [path for name, path in plain if name.match(member)]:
            return wanted
    return []


def _untar(archive: tarfile.TarFile, members: tuple[str, ...], work: Path) -> Iterator[Path]:
    entries = {Path(entry.name): entry for entry in archive if entry.isfile()}
    for name in _wanted(sorted(entries), members):
        content = archive.extractfile(entries[name])
        assert content is not None  # a file, as chosen above
        yield _unpack(content, work / name.name)


def _unpack(content: io.BufferedIOBase | IO[bytes], path: Path) -> Path:
    # Only the last part of a member's name is used: an archive cannot write elsewhere.
    with content, open(path, "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
    return path


def is_gzip(path: Path) -> bool:
    """Tells from the first bytes whether a file is gzip, because names are not reliable."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_text(path: Path, encoding: str = "utf-8-sig") -> io.TextIOWrapper:
    """Opens a plain or gzip file; bytes that are invalid in the encoding become a placeholder."""
    opener = gzip.open if is_gzip(path) else open
    file = opener(path, "rt", encoding=encoding, errors="replace", newline="")
    return cast(io.TextIOWrapper, file)


def first_line(path: Path) -> str:
    """Returns the first line without its end.

    Raises:
      UserError: the file is empty, or a damaged gzip file.
    """
    try:
        with open_text(path) as file:
            line = file.readline(1 << 20).rstrip("\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged_gzip(path) from error
    if not line.strip():
        raise UserError(f"{path} is empty or starts with an empty line; check that it is complete")
    return line


def damaged_gzip(path: Path) -> UserError:
    """Returns the error for a gzip file that ends too early or fails its checksum."""
    return UserError(f"{path} is a truncated or damaged gzip file; fetch it again")


def fingerprint(path: Path) -> dict:
    """Returns the name, the size in bytes and the SHA-256 of a file, for dataset.json.

    Raises:
      UserError: a gzip file ends too early or fails its checksum, which DuckDB does not check.
    """
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if is_gzip(path):
        try:
            with gzip.open(path) as file:
                while file.read(1 << 20):
                    pass
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise damaged_gzip(path) from error
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}
