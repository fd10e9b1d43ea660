"""Prepared events from a table in memory or from files, in one call.

`prepare` does what `python -m data_prep table` does, and speaks of keywords where that speaks of
flags.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from tim4rec_jax import frames
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data.format import DATASET_FILE
from tim4rec_jax.data_prep.flags import parser as data_prep_parser
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import write_json

_ITEM_TABLE = "item_features.parquet"


class TemporaryFolder:
    """A folder that goes with the last object that holds it, or with the process."""

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(prefix="tim4rec-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Data:
    """Prepared events, as `prepare` returns them.

    Attributes:
      dataset: the users with their events, see `tim4rec_jax.data.Dataset`.
      frame: the kind of table that the events came in, which recommendations come back in.
      temporary: whether the folder goes when this object goes.
    """

    def __init__(
        self, folder: str | Path, frame: str = "", temporary: TemporaryFolder | None = None
    ):
        self.dataset: Dataset = open_dataset(folder)
        self.frame = frame
        self.temporary = temporary is not None
        self._keep = temporary

    def __repr__(self) -> str:
        found = self.dataset
        return f"<{found.n_users:,} users, {found.n_items:,} items, {found.n_events:,} events>"


def prepare(
    events: Any,
    *,
    user: str = frames.NAMES["user"],
    item: str = frames.NAMES["item"],
    time: str = frames.NAMES["time"],
    item_features: Any = None,
    out: str | Path | None = None,
    **flags: Any,
) -> Data:
    """Filters events, and sorts them by user and time.

    Args:
      events: a table of pandas, polars, pyarrow or DuckDB with a row for each event, or the paths
        (or globs) of CSV, TSV, JSON lines or Parquet files.
      user: the column that says who. Ids are texts or whole numbers.
      item: the column that says what, likewise.
      time: the column that says when: dates, or numbers since 1970.
      item_features: a table with a row for each item, or paths of one: the item's id under the name
        of `item`, and a column for each feature. Texts and whole numbers are categories, lists of
        them several at once, other numbers and vectors are dense. Models learn from them, and
        recommend items without events by them (docs/item-features.md).
      out: the folder to write. `None` takes a temporary folder.
      flags: the flags of `python -m data_prep table`, under the same names: `time_unit="ms"` for
        numbers that are no seconds, `k_core=5`, `on_bad_row="skip"`, `overwrite=True`, ...

    Raises:
      UserError: a flag, a column or a row cannot be used, or nothing is left of the events.
    """
    with tempfile.TemporaryDirectory() as work:
        table, memory = Path(work) / "events.parquet", {}
        kind, paths = "", [events] if isinstance(events, str | Path) else events
        if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
            paths = [os.fspath(path) for path in paths]
        else:
            wanted = [user, item, time]
            if flags.get("min_rating") is not None:
                wanted.append(flags.get("rating", "rating"))
            columns, kind = frames.to_arrow(events, None if flags.get("where") else wanted)
            columns, memory["types"] = frames.id_texts(columns, user, item)
            if frames.is_temporal(columns[time].type):
                moments = columns[time].cast(pa.timestamp("us", "UTC"), safe=False)
                columns = columns.set_column(columns.column_names.index(time), time, moments)
                flags = {"time_unit": "iso"} | flags
            pq.write_table(columns, table)
            paths = [str(table)]
        temporary = TemporaryFolder() if out is None else None
        folder = temporary.path / "events" if temporary else path_of(out)
        named = {"user": user, "item": item, "time": time}
        if item_features is not None:
            flags = {**flags, "item_features": _feature_paths(item_features, item, Path(work))}
        _data_prep(paths, flags | named | {"out": folder}, table)
    if memory:
        path = folder / DATASET_FILE
        write_json(path, json.loads(path.read_text()) | memory)
    return Data(folder, kind, temporary)


def _feature_paths(table: Any, item: str, work: Path) -> list[str]:
    """The paths of a table of items, which is written to `work` if it is in memory."""
    paths = [table] if isinstance(table, str | Path) else table
    if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
        return [os.fspath(path) for path in paths]
    pq.write_table(frames.item_table(table, item), work / _ITEM_TABLE)
    return [str(work / _ITEM_TABLE)]


def _data_prep(paths: list[str], flags: dict[str, Any], table: Path) -> None:
    """Runs `python -m data_prep table`; messages speak of keywords and of the table instead."""
    from tim4rec_jax.data_prep.__main__ import main
    from tim4rec_jax.data_prep.read import GIVE_FLAG

    parser = data_prep_parser()
    known = vars(parser.parse_args(["table", "--source", "events", "--out", "folder"]))
    words = ["table", "--source", *paths]
    try:
        for name, value in flags.items():
            if name not in known or name in ("command", "source", "files"):
                near = difflib.get_close_matches(name, known, n=1)
                raise UserError(
                    f"{name} is no keyword of prepare{f'; nearest: {near[0]}' if near else ''}"
                )
            flag = "--" + name.replace("_", "-")
            if known[name] is False:  # a flag without a value
                if not isinstance(value, bool):
                    raise UserError(f"{name} is {value!r}; it must be True or False")
                words += [flag] if value else []
            elif value is not None:
                listed = isinstance(value, list | tuple)
                if name == "item_features":
                    words += [flag, *value]
                else:
                    words.append(f"{flag}={','.join(value) if listed else value}")
        parser.parse_args(words)
        main(words, quiet_in_notebooks())
    except UserError as error:
        said = str(error).partition("; see `")[0]  # what a command line is told to read
        said = said.replace(str(table.with_name(_ITEM_TABLE)), "the table of item features")
        said = said.replace(str(table), "the table")
        said = said.replace(GIVE_FLAG, "pass ")
        said = re.sub(r"--([a-z-]+)=(\w+)|--(time-unit) (\w+)", _as_keyword, said)
        said = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda m: m[1].replace("-", "_"), said)
        # A notebook would show both, the one with flags and the name of a temporary file first.
        raise UserError(said) from None


def quiet_in_notebooks() -> Console:
    """A console that shows nothing that moves in a notebook, for which Rich needs ipywidgets.

    Kernels set FORCE_COLOR, by which Rich takes their output for a terminal and writes each frame
    of a spinner below the one before.
    """
    in_notebook = Console().is_jupyter
    return Console(
        force_jupyter=False, force_terminal=False if in_notebook else None, highlight=False
    )


def _as_keyword(flag: re.Match[str]) -> str:
    name, value = flag[1] or flag[3], flag[2] or flag[4]
    return f'{name.replace("-", "_")}="{value}"'


def opened(data: Data | str | Path) -> Data:
    """What `prepare` returned, or the prepared dataset in a folder."""
    return data if isinstance(data, Data) else Data(path_of(data, "what prepare returned, or a"))


def path_of(value: Any, wanted: str = "a") -> Path:
    """The path that a user gave; "" would be the current folder.

    Raises:
      UserError: it is no path.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        given = "''" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{given} is no path; give {wanted} path")
    return Path(value)
