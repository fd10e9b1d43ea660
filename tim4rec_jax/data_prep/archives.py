"""Unpacks members of zip and tar archives, and says what is wrong with an archive."""

import contextlib
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tim4rec_jax.errors import UserError

# Logs become 3 to 30 times smaller in an archive. More than this, and large, is a trap.
_LARGEST_RATIO = 200
_SMALL = 1 << 30  # bytes that are unpacked whatever their ratio is
_DAMAGES = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, ValueError)


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
      size: its bytes after unpacking, as the archive says.
      problem: why it cannot be unpacked; None if it can.
      open: opens its content.
    """

    size: int
    problem: str | None
    open: Callable[[], Any]


class Archive(NamedTuple):
    """An open archive.

    Attributes:
      path: the archive.
      members: its files by their names, in sorted order.
    """

    path: Path
    members: dict[str, Member]

    def unpack(self, names: Sequence[str], work: Path) -> dict[str, Path]:
        """Unpacks members to files of new names: an archive decides nothing about the disk.

        Args:
          names: the members.
          work: the folder for the files.

        Returns:
          The file of each member.

        Raises:
          UserError: a member cannot be unpacked, or all together are too large.
        """
        for name in names:
            if problem := self.members[name].problem:
                raise UserError(f"{self.path}: {name} {problem}; unpack the archive yourself")
        size, free = sum(self.members[name].size for name in names), shutil.disk_usage(work).free
        if size > max(_LARGEST_RATIO * self.path.stat().st_size, _SMALL) or size > free:
            raise UserError(
                f"{self.path} would unpack to {size / 1e9:,.1f} GB from "
                f"{self.path.stat().st_size / 1e9:,.3f} GB, and the disk of --out has "
                f"{free / 1e9:,.1f} GB left; unpack it yourself if that is right"
            )
        files = {}
        for name in names:
            number = sum(1 for _ in work.glob("member-*"))
            files[name] = work / f"member-{number}"
            content = self.members[name].open()
            assert content is not None  # a file, as `problem` says
            with content, open(files[name], "xb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            if files[name].stat().st_size != self.members[name].size:
                raise _damaged(self.path)
        return files


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Archive | None]:
    """Opens an archive; gives None for a file that is none.

    Raises:
      UserError: the archive is damaged, has two members of one name, or raised in the block.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04" and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield Archive(path, _unique(path, list(_in_zip(archive))))
        elif path.name.endswith((".tar", ".tar.gz", ".tgz")) or _is_tar(path):
            with tarfile.open(path) as archive:
                yield Archive(path, _unique(path, list(_in_tar(archive, path))))
        else:
            yield None
    except _DAMAGES as error:
        raise _damaged(path) from error
    except (NotImplementedError, RuntimeError) as error:  # what zipfile raises
        raise UserError(
            f"{path} is encrypted or packed by an unknown method; unpack the archive yourself"
        ) from error


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except _DAMAGES:  # a damaged gzip file, of whatever
        return False


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is a damaged archive; fetch it again")


def _unique(path: Path, members: list[tuple[str, Member]]) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for name, member in sorted(members, key=lambda member: member[0]):
        if name in found:
            raise UserError(f"{path} holds two files called {name}; unpack and rename one of them")
        found[name] = member
    return found


def _in_zip(archive: zipfile.ZipFile) -> Iterator[tuple[str, Member]]:
    for info in archive.infolist():
        if not info.is_dir():
            problem = "is encrypted" if info.flag_bits & 1 else None
            yield info.filename, Member(info.file_size, problem, lambda i=info: archive.open(i))


def _in_tar(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, Member]]:
    for entry in archive:
        if not entry.isdir():
            problem = None if entry.isfile() else "is a link or a device"
            member = Member(entry.size, problem, lambda e=entry: archive.extractfile(e))
            yield entry.name, member
    # At a damaged header in the midst, tarfile ends as if there were no more.
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise _damaged(path)
