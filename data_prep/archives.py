"""Finds the files to read in what the user names: a file, glob, folder, zip or tar archive."""

import glob
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tim4rec_jax.errors import UserError


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


def _unpack(content: IO[bytes], path: Path) -> Path:
    # Only the last part of a member's name is used: an archive cannot write elsewhere.
    with content, open(path, "wb") as file:
        shutil.copyfileobj(content, file, 1 << 20)
    return path
