"""Opens and inspects source files, and quotes texts for SQL."""

import gzip
import zlib
from pathlib import Path
from typing import IO

from tim4rec_jax.errors import UserError


def is_gzip(path: Path) -> bool:
    """Tells from the first bytes whether a file is gzip, because names are not reliable."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_text(path: Path, encoding: str = "utf-8-sig") -> IO[str]:
    """Opens a plain or gzip file; bytes that are invalid in the encoding become a placeholder."""
    opener = gzip.open if is_gzip(path) else open
    return opener(path, "rt", encoding=encoding, errors="replace", newline="")


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


def text(value: object) -> str:
    """Quotes a value as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def name(value: str) -> str:
    """Quotes a column name for SQL."""
    return '"' + value.replace('"', '""') + '"'
