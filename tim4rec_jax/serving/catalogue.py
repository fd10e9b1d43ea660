"""The items of a run under their original ids."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from tim4rec_jax.config import Config
from tim4rec_jax.data.format import DATASET_FILE, ITEMS_FILE, read_items, read_metadata
from tim4rec_jax.data.ids import IdIndex, Texts
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.run import check_model, check_same_dataset, load_model


class Catalogue:
    """The original id, the popularity and the title of every item that a model knows.

    Only `items.parquet` and `dataset.json` are read. A prepared dataset has them, and a run keeps
    those of the dataset that it was trained on.

    Attributes:
        directory: the folder of the dataset or of the run.
        metadata: the content of its `dataset.json`.
        ids: the original id of every item; the item with index i is at position i - 1. It is a
            list that Arrow holds.
        counts: the number of events of every item, likewise.
        titles: the title of every item, likewise, `None` for an item without one. The list is
            empty if the dataset has no titles.
    """

    def __init__(self, directory: Path):
        """Reads the catalogue of a prepared dataset or of a run.

        Raises:
            UserError: a file is missing or damaged.
        """
        self.directory = directory
        self.metadata = read_metadata(directory)
        table = read_items(directory, self.metadata)
        self.ids = ids = Texts(table.column("item"))
        self.counts: Int64[np.ndarray, " V"] = table.column("count").to_numpy()
        has_titles = "title" in table.column_names
        self.titles: Sequence[str | None] = Texts(table.column("title")) if has_titles else []
        self._index = IdIndex(ids.array)

    def __len__(self) -> int:
        return len(self.ids)

    def indices(self, items: Iterable[Any]) -> Int32[np.ndarray, " items"]:
        """The index of each id, 0 for an unknown one; a number counts as its decimal digits."""
        return self._index.find([str(item) for item in items]) + np.int32(1)

    def title(self, item: str) -> str | None:
        """The title of an item, or `None` where it has none."""
        if not self.titles:
            return None
        [index] = self.indices([item])
        return self.titles[index - 1] if index else None

    def search(self, query: str, limit: int) -> list[int]:
        """The positions of items whose title or id contains a text.

        The item whose id or title is the whole text comes first, then the most popular.

        Args:
            query: the text; upper and lower case are the same.
            limit: how many positions at most.
        """
        wanted = query.casefold()
        found = [position for position, name in enumerate(self._names) if wanted in name]

        def key(position: int) -> tuple[bool, int]:
            # A name is the title, a space and the id, and neither has to be looked up.
            name = self._names[position]
            whole = bool(wanted) and (name.endswith(f" {wanted}") or name.startswith(f"{wanted} "))
            if whole:  # which can be words of a title
                title = self.titles[position] if self.titles else None
                whole = wanted in (self.ids[position].casefold(), (title or "").casefold())
            return not whole, -int(self.counts[position])

        return sorted(found, key=key)[:limit]

    @functools.cached_property
    def _names(self) -> list[str]:
        titles = self.titles or [None] * len(self)
        return [
            f"{title or ''} {item}".casefold() for item, title in zip(self.ids, titles, strict=True)
        ]


def id_text(value: Any, what: str) -> str:
    """An id as a text; a number counts as its decimal digits.

    Args:
        value: the id, which may be a value of numpy or Arrow.
        what: what the message of an error begins with, "a user is" for example.

    Raises:
        UserError: it is no text and no whole number: missing, for example, or 5.0 for 5.
    """
    value = value.as_py() if hasattr(value, "as_py") else value
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
        raise UserError(
            f"{what} {value!r}; ids are texts or whole numbers, so convert it or leave it out"
        )
    return str(value)


def load_run(workdir: Path, dataset: Path | None = None) -> tuple[Config, SequenceModel, Catalogue]:
    """Loads the settings of a run, its best model, and the catalogue of the model's items.

    The items are those that the run keeps, so it does not matter what has become of the dataset.
    A run of an earlier version keeps none. Its items are read from its dataset.

    Args:
        workdir: a run directory of train.py.
        dataset: a prepared dataset to read the items from instead.

    Raises:
        UserError: the run or the dataset is missing or damaged, or they do not belong together.
    """
    config, model = load_model(workdir)
    keeps_items = (workdir / DATASET_FILE).exists() and (workdir / ITEMS_FILE).exists()
    catalogue = Catalogue(dataset or (workdir if keeps_items else Path(config.dataset)))
    check_model(model, len(catalogue), catalogue.directory, workdir)
    check_same_dataset(catalogue.directory, catalogue.metadata, workdir)
    return config, model, catalogue
