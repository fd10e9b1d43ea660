"""Turns what DuckDB and Arrow say of a disk, of memory and of data into one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from tim4rec_jax.errors import UserError, first_line
from tim4rec_jax.files import is_full_disk


@contextlib.contextmanager
def one_sentence(
    out: Path,
    *,
    full: str = " ({message})",
    memory: str = "{message}; free memory or pass a higher --memory-limit",
    unreadable: str = "the source cannot be prepared ({message}); check it",
) -> Iterator[None]:
    """Raises `UserError` for what goes wrong inside.

    Args:
      out: the dataset or file that is made.
      full: what is said of a full disk besides, where {message} is what DuckDB or Arrow says.
      memory: the sentence where memory is not enough, likewise.
      unreadable: the sentence for every other error of DuckDB and Arrow, likewise.

    Raises:
      UserError: for every error of DuckDB and Arrow, and for a full disk.
    """
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        message = first_line(error)
        if is_full_disk(error):
            raise UserError(
                f"the disk that {out} is on is full{full.format(message=message)}; make room there "
                "or choose another --out"
            ) from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise UserError(memory.format(message=message)) from error
        if isinstance(error, duckdb.InterruptException):
            raise KeyboardInterrupt from error
        if isinstance(error, OSError):
            raise
        raise UserError(unreadable.format(message=message)) from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise
