"""From a table of events to recommendations, one call each.

    import tim4rec_jax as t4r

    data = t4r.prepare(events, user="customer", item="sku", time="at")
    model = t4r.fit(data, "causal", epochs=25)
    model.recommend(users=["c17", "c42"], k=10)

`prepare` does what `python -m data_prep table` does, `fit` what `train.py` does, and a run of one
can be read by the other. Everything may be called from notebooks and from threads.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tim4rec_jax import config as config_lib
from tim4rec_jax import frames
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data.format import DATASET_FILE, read_items
from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_directory, write_json
from tim4rec_jax.prepared import Data, TemporaryFolder, opened, path_of, prepare
from tim4rec_jax.presets import load_config

__all__ = ["Data", "Model", "fit", "load", "prepare"]

# JAX is imported by `fit` and `load`, so that `prepare` does not wait for it.

# Compiling for one more length takes about as long as this much padding of each of 1,024 histories.
_PADDING_WORTH_A_PROGRAM = 256


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

    data = opened(data)
    temporary = TemporaryFolder() if workdir is None else None
    run = temporary.path / "run" if temporary else path_of(workdir)
    if isinstance(config, str):
        config = load_config(config)
    elif not isinstance(config, config_lib.ConfigDict):
        raise UserError(f"config is {config!r}; give a name, or settings (ConfigDict)")
    config = config.copy_and_resolve_references()
    if init_from is not None:
        config.train.init_from = str(
            init_from.run if isinstance(init_from, Model) else path_of(init_from)
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
    model = Model(path_of(run))
    _ = model.recommender
    return model


class Model:
    """A trained model.

    Attributes:
      run: its run directory.
      frame: the kind of table that recommendations come in, where none was given.
    """

    def __init__(self, run: Path, frame: str = "", temporary: TemporaryFolder | None = None):
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
        data: Data | str | Path | None = None,
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
          data: where the events of `users` are, if not in the data of the training: what was
            prepared since then, or the data of the training at another place.
          columns: `user`, `item`, `time` name the columns of `histories`, and `time_unit` says
            what numbers count ("s", "ms", "us", "ns"), or that texts are dates ("iso"); the
            default is what the preparation was told.

        Returns:
          A table of the kind that came in. It has the columns of the user and the item, which keep
          their names and types, `rank` (1 is best), `score`, and `fallback`. It is true where no
          event of the user was known, so that the items are the most popular ones.

        Raises:
          UserError: a user is not in the data, the data is not that of the training any more, a
            column is missing, a time cannot be right, or `k` or `at` cannot be used.
        """
        from tim4rec_jax.serving.ranker import ids_of

        if (users is None) == (histories is None):
            raise UserError("recommend takes either users= or histories=")
        if users is None and data is not None:
            raise UserError("data is where users= are looked up; leave it out with histories=")
        if unknown := sorted(columns.keys() - frames.NAMES.keys()):
            raise UserError(f"{unknown[0]} is no keyword of recommend")
        if not isinstance(exclude_seen, bool):
            raise UserError(f"exclude_seen is {exclude_seen!r}; it must be True or False")
        names = frames.NAMES | self._remembered("columns") | columns
        if users is not None:
            who, user_type, lengths, events_of = self._of_users(users, data)
            kind, item_type = self.frame, self._item_type()
        else:
            who, user_type, lengths, events_of, kind, item_type = self._of_table(histories, names)
        # Once for all users: an iterator would be empty after the first of them.
        filters: dict[str, Any] = {
            "exclude_seen": exclude_seen,
            "allow": ids_of("allow", allow),
            "deny": ids_of("deny", deny),
        }
        scores, items, known = self._rank(lengths, events_of, k, frames.moments(at), filters)
        row, place = np.nonzero(items)  # item 0 fills up where no item was left
        ids = pa.array(self.recommender.catalogue.ids).take(pa.array(items[row, place] - 1))
        found = {
            names["user"]: frames.typed(who, user_type).take(pa.array(row)),
            names["item"]: frames.typed(ids, item_type),
            "rank": (place + 1).astype(np.int32),
            "score": scores[row, place].astype(np.float32),
            "fallback": ~known[row],
        }
        return frames.like(pa.table(found), kind)

    def _rank(
        self,
        lengths: np.ndarray,
        events_of: Callable[[np.ndarray], Any],
        k: int,
        at: Any,
        filters: dict[str, Any],
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ranks users with histories of similar length together, which need less padding.

        Returns the scores, the items, and of which users an event is known.
        """
        from tim4rec_jax.serving.compiled_model import MAX_ROWS

        if np.ndim(at) and len(at) != len(lengths):
            raise UserError(f"`at` has {len(at)} times for {len(lengths)} users")
        order = np.argsort(lengths, kind="stable")
        parts = [order[n : n + MAX_ROWS] for n in range(0, max(len(order), 1), MAX_ROWS)]
        longest = [int(lengths[rows].max(initial=1)) for rows in parts]
        scores, items, known = [], [], []
        for rows, width in zip(parts, _widths(longest), strict=True):
            moments, events = at[rows] if np.ndim(at) else at, events_of(rows)
            found = self.recommender.ranker.rank(events, k, at=moments, width=width, **filters)
            scores.append(found[0])
            items.append(found[1])
            known.append(np.diff(events.offsets) > 0)
        back = np.argsort(order)
        scores, items, known = (np.concatenate(each)[back] for each in (scores, items, known))
        return scores, items, known

    def _of_users(self, users: Any, data: Data | str | Path | None) -> tuple:
        """The ids of users, their type, the lengths of their histories, and the histories."""
        from tim4rec_jax.run import check_same_dataset
        from tim4rec_jax.serving.history import Events

        given = frames.array(users)
        who, user_type = frames.ids(given, "users")
        if data is not None:
            dataset = opened(data).dataset
        else:
            dataset = self._dataset
            check_same_dataset(
                dataset.directory,
                dataset.metadata,
                self.run,
                more_items=True,
                remedy=f"pass data={str(dataset.directory)!r} if its events are meant",
            )
        rows = frames.positions(who, dataset.user_ids)
        if rows.null_count:
            first = int(np.argmax(rows.is_null().to_numpy(zero_copy_only=False)))
            raise UserError(
                f"{rows.null_count:,} of {len(who):,} users are not in {dataset.directory}, the "
                f"first is {given[first]}; give their events as histories="
            )
        rows = rows.to_numpy().astype(np.int64)
        # Other data than that of the training has its items in another order.
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

        catalogue = self.recommender.catalogue
        # RecBole rounds times to float32 before it sorts.
        rounded = catalogue.metadata["order"] == "recbole"
        found = frames.histories(histories, names, pa.array(catalogue.ids), rounded=rounded)

        def events_of(chosen: np.ndarray) -> Events:
            return Events(*found.of(chosen))

        return found.users, found.user_type, found.lengths, events_of, found.kind, found.item_type

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
        dataset = self._dataset if data is None else opened(data).dataset
        remedy = "pass data= with the data of the training"
        check_same_dataset(dataset.directory, dataset.metadata, self.run, remedy=remedy)
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
          UserError: an item is not known, `k` is below 1, or the model has no vectors of items.
        """
        catalogue = self.recommender.catalogue
        given, _ = frames.ids(frames.array(items), "items")
        indices = catalogue.indices(given.to_pylist())
        if not indices.all():
            raise UserError(f"the model does not know the item {given[int(np.argmin(indices))]}")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k is {k!r}; it must be a whole number of 1 or more")
        model = self.recommender.model.sequence_model
        if model.needs_item_counts:
            raise UserError("the model only counts, and has no vectors of items to compare")
        # Not those that score: the last number of some of them is a bias.
        table = np.asarray(model.item_vectors())[1 : len(catalogue) + 1]
        table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        k = min(k, len(catalogue) - 1)
        scores = table[indices - 1] @ table.T
        scores[np.arange(len(indices)), indices - 1] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        ids, kind = pa.array(catalogue.ids), self._item_type()
        name = (frames.NAMES | self._remembered("columns"))["item"]
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
            table = read_items(items.dataset.directory, items.dataset.metadata)
            ids = table.column("item").to_pylist()
            columns, titles = items.dataset.features.columns(), {}
            if "title" in table.column_names:
                titles = dict(zip(ids, table.column("title").to_pylist(), strict=True))
        else:
            paths = [items] if isinstance(items, str | Path) else items
            item = (frames.NAMES | self._remembered("columns"))["item"]
            if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
                given: Any = [os.fspath(path) for path in paths]
            else:
                given = frames.item_table(items, item)
            ids, columns, titles = read_table(self.run, given, item=item)
        temporary = TemporaryFolder() if folder is None else None
        run = temporary.path / "run" if temporary else path_of(folder)
        add_items(self.run, ids, columns, titles, run)
        larger = Model(run, self.frame, temporary)
        larger._old = self  # whose folder may hold the data
        return larger

    def save(self, folder: str | Path) -> None:
        """Copies the run directory, which `load`, eval.py and the service read.

        Raises:
          UserError: the folder exists and is not empty, or cannot be written.
        """
        folder = path_of(folder)
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
