"""Downloads files with progress, continues interrupted downloads, and checks the result."""

import hashlib
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tim4rec_jax.errors import UserError, one_line
from tim4rec_jax.files import NO_ROOM

_ATTEMPTS = 5
_TIMEOUT = 30.0  # seconds without a byte
_CUT = (urllib.error.URLError, http.client.HTTPException, OSError)


def fetch(
    url: str,
    directory: Path,
    *,
    md5: str | None,
    command: str,
    console: Console,
    pause: float = 1.0,
) -> Path:
    """Downloads a file unless it is there already.

    An incomplete file of an earlier run is continued if the server still has the same file.

    Args:
      url: the owner's address.
      directory: where the file goes.
      md5: the checksum that the owner publishes; None if there is none.
      command: the command that takes the file with `--source`; error messages show it.
      console: where progress is shown.
      pause: seconds to wait before the second attempt; doubled each time.

    Returns:
      The file.

    Raises:
      UserError: the server cannot be reached, refuses, or breaks off again and again, or the
        checksum is wrong. The message says which file to fetch by hand, and from where.
    """
    path = directory / Path(urllib.parse.urlparse(url).path).name
    if path.exists():
        return path
    partial = path.with_name(path.name + ".part")
    by_hand = f"fetch {url} by other means and run `{command} --source {path.name}`"
    answered = False
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            if _continue(url, partial, console):
                break
        except urllib.error.HTTPError as error:
            answered = True
            if error.code == 416:  # the server has nothing after our bytes: start again
                partial.unlink()
            elif error.code < 500 and error.code not in (408, 429):
                raise UserError(f"{url}: the server answers {error.code}; {by_hand}") from error
            reason: object = f"the server answers {error.code}"
        except _CUT as error:
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise UserError(
                    f"{partial} cannot be written: {error.strerror}; make room there, or pass "
                    "another --cache"
                ) from error
            if isinstance(error, OSError) and error.filename:  # our own file: permission
                raise
            reason = getattr(error, "reason", error)
            reason = getattr(reason, "strerror", None) or reason or type(error).__name__
            # A server that has not answered once (no name, no connection) is not asked again.
            answered |= not isinstance(error, urllib.error.URLError)
        else:
            answered, reason = True, "the connection was cut"
        if not answered or attempt == _ATTEMPTS:
            raise UserError(f"cannot download {path.name} ({reason}): {by_hand}")
        console.out(one_line(f"{path.name}: {reason}; trying again"))
        time.sleep(pause * 2 ** (attempt - 1))
    if md5 is not None:
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            partial.unlink()
            raise UserError(
                f"{path.name} from {url} has the checksum {found}, its owner says {md5}: deleted; "
                f"run again, or {by_hand}"
            )
    partial.rename(path)
    _version_file(partial).unlink(missing_ok=True)
    return path


def _continue(url: str, partial: Path, console: Console) -> bool:
    """Appends the missing bytes to `partial`; returns whether the file is now complete."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "tim4rec-jax"})
    version = _version_file(partial)
    if have and version.exists():
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version.read_text())
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if answer.status != 206:
            have = 0  # the whole file, from the start
        size = answer.headers.get("Content-Length")
        total = have + int(size) if size else None
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag:
            version.write_text(tag)
        with open(partial, "ab" if have else "wb") as file, _progress(console) as progress:
            task = progress.add_task(partial.stem, total=total, completed=have)
            while block := answer.read(1 << 18):
                file.write(block)
                progress.advance(task, len(block))
    return total is None or partial.stat().st_size == total


def _version_file(partial: Path) -> Path:
    """Returns the file that keeps the server's version of `partial`."""
    return partial.with_name(partial.name + ".version")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
    )
