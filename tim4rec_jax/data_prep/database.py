"""Opens the DuckDB database in which events are read, filtered and sorted; quotes for its SQL."""

import os
import re
from pathlib import Path

import duckdb

from tim4rec_jax.errors import UserError, one_line

_SIZE = r"[0-9]+([.][0-9]+)? ?([KMGT]i?)?B"


def connect(work: Path, memory_limit: str | None = None) -> duckdb.DuckDBPyConnection:
    """Opens a database in the folder `work`, which also takes what does not fit into memory.

    Raises:
      UserError: `memory_limit` is no size.
    """
    con = duckdb.connect(work / "work.duckdb", config={"temp_directory": str(work / "spill")})
    con.execute("SET TimeZone = 'UTC'; SET preserve_insertion_order = true")
    # In a notebook without ipywidgets there is no bar, and DuckDB refuses even to switch it off.
    if con.execute("SELECT current_setting('enable_progress_bar')").fetchall()[0][0]:
        con.execute("SET enable_progress_bar = false")
    if memory_limit is not None:
        try:
            if not re.fullmatch(_SIZE, memory_limit):  # DuckDB takes -5 for no limit
                raise ValueError(memory_limit)
            con.execute("SET memory_limit = ?", [memory_limit])
        except (duckdb.Error, ValueError) as error:
            shown = one_line(memory_limit, 40)
            raise UserError(f"--memory-limit {shown} is no size; write say 4GB") from error
    return con


def leave_memory(con: duckdb.DuckDBPyConnection, bytes: int) -> None:
    """Has the database take less memory from now on, so that Python can have the rest.

    Args:
      con: the database.
      bytes: what Python needs. At most half of the memory is taken from the database.
    """
    [(text,)] = con.execute("SELECT current_setting('memory_limit')").fetchall()
    number, _, unit = text.partition(" ")  # "953.6 MiB"
    power = ("bytes", "KiB", "MiB", "GiB", "TiB").index(unit)
    limit = int(float(number) * 1024**power)
    con.execute("SET memory_limit = ?", [f"{max(limit - bytes, limit // 2)}B"])


def quote_text(value: object) -> str:
    """Quotes a value as an SQL string."""
    return "'" + str(value).replace("'", "''") + "'"


def quote_path(path: Path) -> str:
    """Quotes a path for the readers of SQL, which take it for a glob otherwise.

    Raises:
      UserError: it holds a backslash beside one of * ? [, which no pattern of DuckDB can match.
    """
    text = os.path.abspath(path)  # so that `~` and `s3:` mean nothing
    if any(letter in text for letter in "*?["):
        if "\\" in text:
            raise UserError(f"{path} has a backslash beside one of * ? [ in its name; rename it")
        text = re.sub(r"[*?\[]", r"[\g<0>]", text)
    return quote_text(text)


def quote_name(value: str) -> str:
    """Quotes the name of a column or table for SQL."""
    return '"' + value.replace('"', '""') + '"'
