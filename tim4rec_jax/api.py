"""From a table of events to recommendations, one call each.

    import tim4rec_jax as t4r

    data = t4r.prepare(events, user="customer", item="sku", time="at")
    model = t4r.fit(data, "causal", epochs=25)
    model.recommend(users=["c17", "c42"], k=10)

`prepare` does what `python -m data_prep table` does, `fit` what `train.py` does, and a run of one
can be read by the other. Everything may be called from notebooks and from threads.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import json
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from tim4rec_jax import config as config_lib
from tim4rec_jax import frames
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data.format import DATASET_FILE
from tim4rec_jax.data_prep.flags import parser as data_prep_parser
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_directory, write_json
from tim4rec_jax.presets import load_config

# JAX is imported by `fit` and `load`, so that `prepare` does not wait for it.

# Compiling for one more length takes about as long as this much padding of each of 1,024 histories.
_PADDING_WORTH_A_PROGRAM = 256
_ITEM_TABLE = "item_features.parquet"
_DEFAULTS = {"user": "user_id", "item": "item_id", "time": "timestamp", "time_unit": "s"}


class _Temporary:
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

    def __init__(self, folder: str | Path, frame: str = "", temporary: _Temporary | None = None):
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
    user: str = "user_id",
    item: str = "item_id",
    time: str = "timestamp",
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
            columns, memory["types"] = _as_texts(columns, user, item)
            if frames.is_temporal(columns[time].type):
                moments = columns[time].cast(pa.timestamp("us", "UTC"), safe=False)
                columns = columns.set_column(columns.column_names.index(time), time, moments)
                flags = {"time_unit": "iso"} | flags
            pq.write_table(columns, table)
            paths = [str(table)]
        temporary = _Temporary() if out is None else None
        folder = temporary.path / "events" if temporary else _path(out)
        named = {"user": user, "item": item, "time": time}
        if item_features is not None:
            flags = {**flags, "item_features": _feature_paths(item_features, item, Path(work))}
        _data_prep(paths, flags | named | {"out": folder}, table)
    unit = flags.get("time_unit", "s")
    memory["columns"] = named | {"time_unit": "s" if unit == "iso" else unit}
    path = folder / DATASET_FILE
    write_json(path, json.loads(path.read_text()) | memory)
    return Data(folder, kind, temporary)


def _feature_paths(table: Any, item: str, work: Path) -> list[str]:
    """The paths of a table of items, which is written to `work` if it is in memory."""
    paths = [table] if isinstance(table, str | Path) else table
    if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
        return [os.fspath(path) for path in paths]
    pq.write_table(_item_frame(table, item), work / _ITEM_TABLE)
    return [str(work / _ITEM_TABLE)]


def _item_frame(table: Any, item: str) -> pa.Table:
    """A table of items as an Arrow table with texts for ids."""
    columns, _ = frames.to_arrow(table, None)
    if item not in columns.column_names:
        raise UserError(
            f"the table of item features has no column {item!r}, only "
            f"{', '.join(columns.column_names)}; name it as in the table of events"
        )
    columns = columns.select(  # pandas gives its index along
        [name for name in columns.column_names if not name.startswith("__index_level_")]
    )
    texts, _ = frames.ids(columns[item], item)
    return columns.set_column(columns.column_names.index(item), item, texts)


def _as_texts(table: pa.Table, *columns: str) -> tuple[pa.Table, dict[str, str]]:
    """The table with these columns of ids as texts, and the types that they had."""
    types = {}
    for name, column in zip(("user", "item"), columns, strict=True):
        texts, kind = frames.ids(table[column], column)
        table = table.set_column(table.column_names.index(column), column, texts)
        types[name] = str(kind)
    return table, types


class _Refusing(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _data_prep(paths: list[str], flags: dict[str, Any], table: Path) -> None:
    """Runs `python -m data_prep table`; messages speak of keywords and of the table instead."""
    from tim4rec_jax.data_prep.__main__ import main

    parser = data_prep_parser(_Refusing)
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
        # Rich shows nothing that moves in a notebook, for which it would need ipywidgets.
        main(words, Console(force_jupyter=False))
    except UserError as error:
        said = str(error).replace(str(table.with_name(_ITEM_TABLE)), "the table of item features")
        said = said.replace(str(table), "the table")
        said = re.sub(r"--([a-z-]+)=(\w+)|--(time-unit) (\w+)", _as_keyword, said)
        said = re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda m: m[1].replace("-", "_"), said)
        raise UserError(said) from error


def _as_keyword(flag: re.Match[str]) -> str:
    name, value = flag[1] or flag[3], flag[2] or flag[4]
    return f'{name.replace("-", "_")}="{value}"'


def fit(
    data: Data | str | Path,
    config: Any = "causal",
    *,
    workdir: str | Path | None = None,
    loggers: Sequence[Any] = (),
    init_from: Model | str | Path | None = None,
    **settings: Any,
) -> Model:
    """Trains a model, and shows how far it is.

    Args:
      data: what `prepare` returned, or the folder of a prepared dataset.
      config: the settings to begin with: "causal", which is the one to begin with, the name of a
        model ("sasrec"), a configuration by name or by path ("beauty:causal", "my.py:small"), or
        settings themselves (`tim4rec_jax.config.default()`).
      workdir: the run directory, as train.py makes it. A training that was stopped goes on there,
        and one that is finished is read. `None` takes a temporary folder; see `Model.save`.
      loggers: objects with the methods of `tim4rec_jax.training.loggers.Logger`, which get the
        figures while the model trains.
      init_from: a model of `fit`, or a run directory, whose weights the training begins with.
        Items are matched by their ids.
      settings: settings that differ, by their full name, `**{"model.hidden_size": 64}`, or by the
        last word where only one setting has it: `epochs=25`. The command `tim4rec train --help`
        lists them.

    Raises:
      UserError: a setting or the data cannot be used, `workdir` holds another run, or the training
        diverges.
      KeyboardInterrupt: the training was interrupted, after a checkpoint.
    """
    from tim4rec_jax.run import check_same_dataset
    from tim4rec_jax.training.loggers import checked_logger
    from tim4rec_jax.training.train import train_and_report

    data = _opened(data)
    temporary = _Temporary() if workdir is None else None
    run = temporary.path / "run" if temporary else _path(workdir)
    if isinstance(config, str):
        config = load_config(config)
    elif not isinstance(config, config_lib.ConfigDict):
        raise UserError(f"config is {config!r}; give a name, or settings (ConfigDict)")
    config = config.copy_and_resolve_references()
    if init_from is not None:
        config.train.init_from = str(
            init_from.run if isinstance(init_from, Model) else _path(init_from)
        )
    if {"dataset", "prepare"} & settings.keys():
        raise UserError("dataset and prepare are no settings of fit; the data comes first")
    _change(config, settings)
    # A run keeps data that would go otherwise, so that it can be evaluated and continued.
    config.dataset = str(run / "data" if data.temporary else data.dataset.directory)

    def keep(config: Any) -> None:
        check_same_dataset(data.dataset.directory, data.dataset.metadata, run)
        if data.temporary and not (run / DATASET_FILE).exists():
            _copy(data.dataset.directory, run / "data")

    train_and_report(config_lib.resolve(config), run, keep, list(map(checked_logger, loggers)))
    return Model(run, data.frame, temporary)


def _opened(data: Data | str | Path) -> Data:
    return data if isinstance(data, Data) else Data(_path(data, "what prepare returned, or a"))


def _path(value: Any, wanted: str = "a") -> Path:
    """The path that a user gave; "" would be the current folder.

    Raises:
      UserError: it is no path.
    """
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        given = "''" if isinstance(value, str) else type(value).__name__
        raise UserError(f"{given} is no path; give {wanted} path")
    return Path(value)


def _change(config: Any, settings: dict[str, Any]) -> None:
    """Sets settings by their full names, or by short ones that only one setting has."""
    # The name of another model brings the settings of that model.
    for name, value in sorted(settings.items(), key=lambda s: s[0] not in ("name", "model.name")):
        full = _full_name(name, list(config_lib.flatten(config)))
        group, _, key = full.rpartition(".")
        value = value.item() if isinstance(value, np.generic) else value
        try:
            if full == "model.name":
                config_lib.use_model(config, value)
            else:
                (config[group] if group else config)[key] = value
        except TypeError as error:
            raise UserError(f"{full} is {value!r}, which is of another type: {error}") from error
        except ValueError as error:
            raise UserError(f"model.{error}") from error


def _full_name(name: str, known: list[str]) -> str:
    """The setting of this name, or the only one whose last word it is."""
    words = [each.rpartition(".")[2] for each in known]
    found = [each for each, word in zip(known, words, strict=True) if name in (each, word)]
    if len(found) > 1:
        raise UserError(f"{name} may be {' or '.join(found)}; give the full name")
    if found:
        return found[0]
    near = difflib.get_close_matches(name.rpartition(".")[2], words, n=1)
    hint = f"; nearest: {known[words.index(near[0])]}" if near else ""
    raise UserError(f"{name} is not a setting of this model{hint}")


def _copy(source: Path, target: Path) -> None:
    """Copies a folder of files that never change, without another copy on the disk if possible."""

    def link(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copyfile(old, new)

    with atomic_directory(target) as folder:
        shutil.copytree(source, folder, copy_function=link, dirs_exist_ok=True)


def load(run: str | Path) -> Model:
    """The best model of a run of `fit` or of train.py.

    Raises:
      UserError: the run is missing or damaged.
    """
    model = Model(_path(run))
    _ = model.recommender
    return model


class Model:
    """A trained model.

    Attributes:
      run: its run directory.
      frame: the kind of table that recommendations come in, where none was given.
    """

    def __init__(self, run: Path, frame: str = "", temporary: _Temporary | None = None):
        self.run, self.frame, self._keep = run, frame, temporary
        self._old: Model | None = None

    def __repr__(self) -> str:
        return f"<model of the run {self.run}>"

    @functools.cached_property
    def recommender(self) -> Any:
        """The `tim4rec_jax.serving.Recommender` of the run, for single requests."""
        from tim4rec_jax.runtime import enable_compilation_cache
        from tim4rec_jax.serving import Recommender

        enable_compilation_cache()
        return Recommender.load(self.run)

    @property
    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` of the run holds, the test figures among it."""
        from tim4rec_jax.run import read_figures

        return read_figures(self.run)

    def recommend(
        self,
        users: Any = None,
        histories: Any = None,
        *,
        k: int = 10,
        exclude_seen: bool = True,
        at: Any = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = None,
        **columns: str,
    ) -> Any:
        """Recommends items to users of the data, or after histories of any users.

        Args:
          users: ids of users of the data, as a list, an array or a column. All of their events
            count, the validation and the test event too.
          histories: a table of events in any order. Its users need not be known. Items that the
            model does not know are left out.
          k: how many items for each user; fewer where fewer are left.
          exclude_seen: whether to leave out the items of the history.
          at: when the items will be shown, for a model trained with `model.knows_next_time`: one
            moment, or one for each user in the order of `users`, or of their first events.
          allow: the ids of the only items to recommend; unknown ids are ignored.
          deny: the ids of items never to recommend.
          columns: `user`, `item`, `time` name the columns of `histories`, and `time_unit` says
            what numbers count; the default is what `prepare` was told.

        Returns:
          A table of the kind that came in. It has the columns of the user and the item, which keep
          their names and types, `rank` (1 is best), `score`, and `fallback`. It is true where no
          event of the user was known, so that the items are the most popular ones.

        Raises:
          UserError: a user is not in the data, a column is missing, a time cannot be right, or
            `k` or `at` cannot be used.
        """
        if (users is None) == (histories is None):
            raise UserError("recommend takes either users= or histories=")
        if unknown := sorted(columns.keys() - _DEFAULTS.keys()):
            raise UserError(f"{unknown[0]} is no keyword of recommend")
        if not isinstance(exclude_seen, bool):
            raise UserError(f"exclude_seen is {exclude_seen!r}; it must be True or False")
        names = _DEFAULTS | self._remembered("columns") | columns
        if users is not None:
            who, user_type, lengths, events_of = self._of_users(users)
            kind, item_type = self.frame, self._item_type()
        else:
            who, user_type, lengths, events_of, kind, item_type = self._of_table(histories, names)
        filters: dict[str, Any] = dict(exclude_seen=exclude_seen, allow=allow, deny=deny)
        scores, items = self._rank(lengths, events_of, k, _moments(at), filters)
        row, place = np.nonzero(items)  # item 0 fills up where no item was left
        ids = pa.array(self.recommender.catalogue.ids).take(pa.array(items[row, place] - 1))
        found = {
            names["user"]: frames.typed(who, user_type).take(pa.array(row)),
            names["item"]: frames.typed(ids, item_type),
            "rank": (place + 1).astype(np.int32),
            "score": scores[row, place].astype(np.float32),
            "fallback": (lengths == 0)[row],
        }
        return frames.like(pa.table(found), kind)

    def _rank(
        self,
        lengths: np.ndarray,
        events_of: Callable[[np.ndarray], Any],
        k: int,
        at: Any,
        filters: dict[str, Any],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks users with histories of similar length together, which need less padding."""
        from tim4rec_jax.serving.compiled_model import MAX_ROWS

        if np.ndim(at) and len(at) != len(lengths):
            raise UserError(f"`at` has {len(at)} times for {len(lengths)} users")
        order = np.argsort(lengths, kind="stable")
        parts = [order[n : n + MAX_ROWS] for n in range(0, max(len(order), 1), MAX_ROWS)]
        longest = [int(lengths[rows].max(initial=1)) for rows in parts]
        scores, items = [], []
        for rows, width in zip(parts, _widths(longest), strict=True):
            moments = at[rows] if np.ndim(at) else at
            found = self.recommender.ranker.rank(
                events_of(rows), k, at=moments, width=width, **filters
            )
            scores.append(found[0])
            items.append(found[1])
        back = np.argsort(order)
        return np.concatenate(scores)[back], np.concatenate(items)[back]

    def _of_users(self, users: Any) -> tuple:
        """The ids of users, their type, the lengths of their histories, and the histories."""
        from tim4rec_jax.serving.history import Events

        given = _array(users)
        who, user_type = frames.ids(given, "users")
        dataset = self._dataset
        rows = _positions(who, dataset.user_ids)
        if rows.null_count:
            first = int(np.argmax(rows.is_null().to_numpy(zero_copy_only=False)))
            raise UserError(
                f"{rows.null_count:,} of {len(who):,} users are not in {dataset.directory}, the "
                f"first is {given[first]}; give their events as histories="
            )
        rows = rows.to_numpy().astype(np.int64)
        # The data may have been prepared again since the training, with items in another order.
        known = np.append(
            np.int32(0), self.recommender.catalogue.indices(dataset.item_ids.to_pylist())
        )

        def events_of(chosen: np.ndarray) -> Events:
            starts, counts = dataset.offsets[rows[chosen]], dataset.lengths[rows[chosen]]
            width = int(counts.max(initial=1))
            items = known[dataset.items(starts, counts, width)]
            times = dataset.timestamps(starts, counts, width)
            offsets = np.append(0, np.cumsum((items > 0).sum(axis=1)))
            return Events(items[items > 0], times[items > 0], offsets)

        return who, user_type, dataset.lengths[rows], events_of

    def _of_table(self, histories: Any, names: dict[str, str]) -> tuple:
        """The users of a table in the order of their first events, as `_of_users` gives them.

        The kind of the table and the type of its items follow.
        """
        from tim4rec_jax.serving.history import Events

        wanted = [names["user"], names["item"], names["time"]]
        table, kind = frames.to_arrow(histories, wanted)
        for name in wanted[:2]:
            if table[name].null_count:
                row = pc.index(table[name].is_null(), True).as_py()
                raise UserError(f"row {row} of the table has no {name!r}")
        texts, user_type = frames.ids(table[wanted[0]], wanted[0])
        items, item_type = frames.ids(table[wanted[1]], wanted[1])
        times = frames.seconds(table[wanted[2]], wanted[2], names["time_unit"])
        catalogue = self.recommender.catalogue
        encoded = texts.dictionary_encode()
        codes, who = encoded.indices.to_numpy(), encoded.dictionary
        found = _positions(items, pa.array(catalogue.ids))
        indices = found.fill_null(-1).to_numpy().astype(np.int32) + 1
        # RecBole rounds times to float32 before it sorts.
        keys = times.astype(np.float32) if catalogue.metadata["order"] == "recbole" else times
        order = np.lexsort((keys, codes))
        order = order[indices[order] > 0]
        indices, times = indices[order], times[order]
        lengths = np.bincount(codes[order], minlength=len(who))
        starts = np.cumsum(lengths) - lengths

        def events_of(chosen: np.ndarray) -> Events:
            counts = lengths[chosen]
            offsets = np.append(0, np.cumsum(counts))
            places = np.arange(offsets[-1]) + np.repeat(starts[chosen] - offsets[:-1], counts)
            return Events(indices[places], times[places], offsets)

        return who, user_type, lengths, events_of, kind, item_type

    def evaluate(
        self,
        split: str = "test",
        *,
        exclude_seen: bool = False,
        ks: Sequence[int] | None = None,
        ties: str | None = None,
        data: Data | str | Path | None = None,
    ) -> dict[str, float]:
        """Ranks the event of every user that a split holds back among all items, as eval.py does.

        Args:
          split: "test" or "valid".
          exclude_seen: whether the items of the history do not compete.
          ks: the cut-offs k; `None` takes `eval.ks` of the settings.
          ties: the place of a target among items with its very score, "optimistic" (the best) or
            "expected" (the mean over all orders); `None` takes `eval.ties` of the settings.
          data: the data, if it has moved since the training.

        Returns:
          The metrics by name, "hit@10", "ndcg@10", "mrr@10" and so on.

        Raises:
          UserError: the data is gone, or is not that of the training.
        """
        from tim4rec_jax.evaluation.evaluate import batch_settings, evaluate
        from tim4rec_jax.run import check_same_dataset, load_model

        if split not in ("test", "valid"):
            raise UserError(f"split is {split!r}; it must be test or valid")
        config, model = load_model(self.run)
        dataset = self._dataset if data is None else _opened(data).dataset
        check_same_dataset(dataset.directory, dataset.metadata, self.run)
        how = config.data
        dataset = dataset.split(how.split, how.valid_from, how.test_from)
        settings: dict[str, Any] = batch_settings(config)
        for name, value in (("ks", ks), ("ties", ties)):
            try:
                setting = config_lib.SETTINGS[f"eval.{name}"]
                settings[name] = config.eval[name] if value is None else setting.checked(value)
            except ValueError as error:
                raise UserError(f"{name} {error}") from error
        return evaluate(model, dataset, split, exclude_seen=exclude_seen, **settings)[0]

    def similar_items(self, items: Any, k: int = 10) -> Any:
        """The items whose vectors point most nearly in the same direction.

        Args:
          items: ids of items that the model knows.
          k: how many for each.

        Returns:
          A table with the columns of the item, `similar`, `rank` (1 is nearest) and `score`, the
          cosine between the two vectors.

        Raises:
          UserError: an item is not known, or `k` is below 1.
        """
        catalogue = self.recommender.catalogue
        given, _ = frames.ids(_array(items), "items")
        indices = catalogue.indices(given.to_pylist())
        if not indices.all():
            raise UserError(f"the model does not know the item {given[int(np.argmin(indices))]}")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k is {k!r}; it must be a whole number of 1 or more")
        table = np.asarray(self.recommender.model.table)[1 : len(catalogue) + 1]
        table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        k = min(k, len(catalogue) - 1)
        scores = table[indices - 1] @ table.T
        scores[np.arange(len(indices)), indices - 1] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        ids, kind = pa.array(catalogue.ids), self._item_type()
        name = (_DEFAULTS | self._remembered("columns"))["item"]
        found = {
            name: frames.typed(given.take(pa.array(np.repeat(np.arange(len(given)), k))), kind),
            "similar": frames.typed(ids.take(pa.array(best.ravel())), kind),
            "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(given)),
            "score": np.take_along_axis(scores, best, axis=1).ravel().astype(np.float32),
        }
        return frames.like(pa.table(found), self.frame)

    def with_items(self, items: Any, folder: str | Path | None = None) -> Model:
        """A model that knows further items, by their features alone. Nothing is trained.

        Args:
          items: what `prepare` returned for data with these items, or a table of items as
            `prepare` takes it. Known items in it are left out.
          folder: the run directory of the new model. `None` takes a temporary folder.

        Raises:
          UserError: the model was trained without item features, or the table does not fit.
        """
        from tim4rec_jax.commands.add_items import add_items, read_table

        if isinstance(items, Data):
            if items.dataset.features is None:
                raise UserError("the data has no item features; prepare it with item_features=")
            ids = items.dataset.item_ids.to_pylist()
            columns = items.dataset.features.columns()
        else:
            paths = [items] if isinstance(items, str | Path) else items
            item = (_DEFAULTS | self._remembered("columns"))["item"]
            if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
                ids, columns = read_table(self.run, [os.fspath(p) for p in paths], item=item)
            else:
                ids, columns = read_table(self.run, _item_frame(items, item), item=item)
        temporary = _Temporary() if folder is None else None
        run = temporary.path / "run" if temporary else _path(folder)
        add_items(self.run, ids, columns, run)
        larger = Model(run, self.frame, temporary)
        larger._old = self  # whose folder may hold the data
        return larger

    def save(self, folder: str | Path) -> None:
        """Copies the run directory, which `load`, eval.py and the service read.

        Raises:
          UserError: the folder exists and is not empty, or cannot be written.
        """
        folder = _path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder; choose another")
        with atomic_directory(folder) as copy:
            shutil.copytree(self.run, copy, dirs_exist_ok=True)
            settings = json.loads((copy / "config.json").read_text())
            if (copy / "data").is_dir():
                write_json(copy / "config.json", settings | {"dataset": str(folder / "data")})

    @functools.cached_property
    def _dataset(self) -> Dataset:
        """The data of the training, which a run keeps itself if it had no folder of its own."""
        if (self.run / "data").is_dir():
            return open_dataset(self.run / "data")
        from tim4rec_jax.run import read_settings

        return open_dataset(read_settings(self.run / "config.json").dataset)

    def _remembered(self, what: str) -> dict[str, str]:
        """What `prepare` has noted about the table: the names of `columns`, and their `types`."""
        return self.recommender.catalogue.metadata.get(what, {})

    def _item_type(self) -> pa.DataType:
        return pa.type_for_alias(self._remembered("types").get("item", "string"))


def _widths(longest: list[int]) -> list[int]:
    """The length that each part of the histories is padded to, a power of two.

    Each length is one more program to compile. So a length that few parts have is replaced by the
    next one, where that saves more time than the padding costs.

    Args:
      longest: the longest history of each part.
    """
    widths = np.array([1 << (length - 1).bit_length() for length in longest])
    for narrow, wide in itertools.pairwise(np.unique(widths)):
        here = widths == narrow
        if here.sum() * (wide - narrow) < _PADDING_WORTH_A_PROGRAM:
            widths[here] = wide
    return widths.tolist()


def _positions(values: pa.Array, among: pa.Array | pa.ChunkedArray) -> pa.Array:
    """The position of each value, null where it is not there."""
    return pc.call_function("index_in", [values], pc.SetLookupOptions(among))


def _array(values: Any) -> pa.Array | pa.ChunkedArray:
    """A list, an array or a column as an Arrow array."""
    if isinstance(values, str | bytes):
        raise UserError(f"{values!r} is one id; give a list of ids")
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    try:
        return pa.array(values.to_numpy() if hasattr(values, "to_numpy") else values)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise UserError(f"the ids cannot be read: {error}") from error


def _moments(at: Any) -> Any:
    """Moments in whole seconds since 1970: one, or an array."""
    if at is None:
        return None
    one = isinstance(at, str) or not (isinstance(at, Sequence) or hasattr(at, "__len__"))
    try:
        array = pa.chunked_array([_array([at] if one else at)])
        if array.type == pa.string():
            array = array.cast(pa.timestamp("us"))
    except (pa.ArrowException, UserError) as error:
        raise UserError(f"`at` is {at!r}, which is no date and no number since 1970") from error
    moments = frames.seconds(array, "at", "s")
    return int(moments[0]) if one else moments
