"""The users of the training under their original ids."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np

from tim4rec_jax.config import Config
from tim4rec_jax.data import Dataset, open_dataset
from tim4rec_jax.data.format import DATASET_FILE, SEQUENCES_GLOB, read_metadata
from tim4rec_jax.data.ids import IdIndex
from tim4rec_jax.errors import UserError
from tim4rec_jax.run import check_same_dataset
from tim4rec_jax.serving.history import Events


class TrainingUsers:
    """Looks up what users did in the dataset that a model was trained on.

    The dataset is opened at the first look-up, or by `open`. An index of 12 bytes for each user is
    kept in memory; events and ids stay in the mapped files.

    Attributes:
        directory: the dataset.
        content: what tells its events from those of other datasets.
    """

    def __init__(self, directory: Path):
        """Names a dataset.

        Raises:
            UserError: its `dataset.json` cannot be read.
        """
        self.directory = directory
        metadata = read_metadata(directory)
        self.content = str(metadata.get("content", {}).get("sequences", "of an earlier version"))
        self._rounded = metadata["order"] == "recbole"

    def open(self) -> None:
        """Opens the dataset and reads it once, to check it.

        Raises:
            UserError: it is missing or damaged.
        """
        _ = self._index

    def find(self, user: str) -> Events | None:
        """All events of a user in order of time, or `None` if the training had no such user."""
        dataset, index = self._index
        row = int(index.find([user])[0])
        if row < 0:
            return None
        starts, lengths = dataset.offsets[row : row + 1], dataset.lengths[row : row + 1]
        width = int(lengths[0])
        items = dataset.items(starts, lengths, width)[0]
        times = dataset.timestamps(starts, lengths, width)[0]
        return Events(items, times, np.array([0, width]))

    def merge(self, before: Events, after: Events) -> Events:
        """Joins a user's events of the training with those that a store holds.

        Whoever has posted events of the training again has them once.

        Args:
            before: from `find`.
            after: the known events of the store, in order of time.
        """
        keys = [part.timestamps for part in (before, after)]
        if self._rounded:  # as the dataset orders events
            keys = [key.astype(np.float32) for key in keys]
        if not (before.items.size and after.items.size) or keys[1][0] > keys[0][-1]:
            return Events.joined([before, after])._replace(
                offsets=np.array([0, before.items.size + after.items.size])
            )
        left = Counter(zip(before.items.tolist(), before.timestamps.tolist(), strict=True))
        new = np.ones(after.items.size, bool)
        for place, event in enumerate(
            zip(after.items.tolist(), after.timestamps.tolist(), strict=True)
        ):
            if left[event] > 0:
                left[event] -= 1
                new[place] = False
        order = np.argsort(np.concatenate([keys[0], keys[1][new]]), kind="stable")
        items = np.concatenate([before.items, after.items[new]])[order]
        times = np.concatenate([before.timestamps, after.timestamps[new]])[order]
        return Events(items, times, np.array([0, len(items)]))

    @functools.cached_property
    def _index(self) -> tuple[Dataset, IdIndex]:
        """The dataset, and where each user stands in it."""
        dataset = open_dataset(self.directory)
        return dataset, IdIndex(dataset.user_ids)


def of_run(workdir: Path, config: Config, dataset: Path | None) -> TrainingUsers | None:
    """The users of the training of a run, or `None` if its dataset is not at hand any more.

    Args:
        workdir: the run directory.
        config: its settings, which name the dataset.
        dataset: where the dataset lies now, if it has moved.
    """
    directory = dataset or Path(config.dataset)
    if not ((workdir / DATASET_FILE).exists() and any(directory.glob(SEQUENCES_GLOB))):
        return None
    try:
        check_same_dataset(directory, read_metadata(directory), workdir, more_items=True)
        return TrainingUsers(directory)
    except UserError:  # it has been prepared again, or is another one
        return None
