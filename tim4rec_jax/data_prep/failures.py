"""Turns what DuckDB and Arrow say of a disk, of memory and of data into one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from tim4rec_jax.errors import UserError, first_line


@contextlib.contextmanager
def one_sentence(out: Path) -> Iterator[None]:
    """Raises `UserError` for what goes wrong inside.

    Args:
      out: the dataset that is made.

    Raises:
      UserError: for every error of DuckDB and Arrow, and for a full disk.
    """
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        message = first_line(error)
        if is_full_disk(error):
            raise UserError(
                f"the disk that {out} is on is full ({message}); make room there or choose "
                "another --out"
            ) from error
        if isinstance(error, duckdb.OutOfMemoryException):
            raise UserError(f"{message}; free memory or pass a higher --memory-limit") from error
        if isinstance(error, duckdb.InterruptException):
            raise KeyboardInterrupt from error
        if isinstance(error, OSError):
            raise
        raise UserError(f"the source cannot be prepared ({message}); check it") from error
    except RuntimeError as error:
        if str(error) == "Query interrupted":  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that a disk has no room left, for which DuckDB has several exceptions.

    The second and third text are of quotas, and the last one is of what DuckDB moves out of memory.
    """
    texts = ("No space left", "File too large", "quota", "max_temp_directory_size")
    return any(text in str(error) for text in texts)
