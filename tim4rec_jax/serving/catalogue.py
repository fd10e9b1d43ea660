"""The items of a run under their original ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from tim4rec_jax.config import Config
from tim4rec_jax.data.dataset import read_items, read_metadata
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.run import check_model, check_same_dataset, load_model


def load_run(workdir: Path, dataset: Path | None = None) -> tuple[Config, SequenceModel, Catalogue]:
    """The settings of a run, its best model, and what the model's items stand for.

    Args:
        workdir: a run directory of train.py.
        dataset: the prepared dataset, if it has moved since the training; only its
            `items.parquet` and `dataset.json` are needed.

    Raises:
        UserError: the run or the dataset is missing or damaged, or they do not belong together.
    """
    config, model = load_model(workdir)
    catalogue = Catalogue(dataset or Path(config.dataset))
    check_model(model, len(catalogue), catalogue.directory, workdir)
    trained_on = workdir / "dataset.json"
    if trained_on.exists():
        check_same_dataset(catalogue.directory, catalogue.metadata, trained_on)
    return config, model, catalogue


class Catalogue:
    """What a model's item indices stand for; the events of the dataset are not read.

    Attributes:
        directory: of the prepared dataset.
        metadata: what its dataset.json holds.
        ids: original id of every item; index i at position i - 1.
        counts: events of every item, int64, likewise.
        titles: likewise, None for items without one; empty if the dataset has no titles.
    """

    def __init__(self, directory: Path):
        """Reads the catalogue of a prepared dataset.

        Raises:
            UserError: the dataset is missing or damaged.
        """
        self.directory = directory
        self.metadata = read_metadata(directory)
        table = read_items(directory, self.metadata)
        self.ids: list[str] = table.column("item").to_pylist()
        self.counts: Int64[np.ndarray, " V"] = table.column("count").to_numpy()
        has_titles = "title" in table.column_names
        self.titles: list[str | None] = table.column("title").to_pylist() if has_titles else []
        self._index = {item: index for index, item in enumerate(self.ids, 1)}

    def __len__(self) -> int:
        return len(self.ids)

    def indices(self, items: Iterable[Any]) -> Int32[np.ndarray, " items"]:
        """Index of each id (a number counts as its decimal digits), 0 where it is not known."""
        get = self._index.get
        return np.fromiter((get(str(item), 0) for item in items), np.int32)

    def title(self, item: str) -> str | None:
        """The title of an item, or None where it has none."""
        index = self._index.get(item, 0)
        return self.titles[index - 1] if self.titles and index else None
