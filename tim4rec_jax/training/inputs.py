"""What the settings of a run choose: the devices, the batches, the features of items."""

from typing import Any

import numpy as np

from tim4rec_jax import config as config_lib
from tim4rec_jax.config import Config
from tim4rec_jax.data import Dataset, PackedBatches, TrainBatches, train_item_counts
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import FeatureArrays
from tim4rec_jax.runtime import Placement, data_sharding, item_sharding
from tim4rec_jax.training import processes


def choose_devices(config: Config) -> Placement:
    """The devices of a run, and how its arrays lie on them.

    Args:
      config: the settings, resolved.

    Raises:
      UserError: there are fewer devices than the settings ask for.
    """
    mesh, train = config.mesh, config.train
    spread = config_lib.spreads_tables(config) or processes.together()
    if spread or train.item_optimizer != "adam":
        return item_sharding(train.batch_size, mesh.data, mesh.catalogue)
    return data_sharding(train.batch_size)


def feature_arrays(dataset: Dataset) -> FeatureArrays | None:
    """The features of a dataset's items with their training events; None if there are none."""
    if dataset.features is None:
        return None
    codes, weights, dense, values = dataset.features.arrays()
    counts = np.append(1, train_item_counts(dataset))  # padding is no item that nobody wants
    return FeatureArrays(codes, weights, dense, counts, values)


def make_batches(
    config: Config, dataset: Dataset, part: int = 0, parts: int = 1
) -> TrainBatches | PackedBatches:
    """The batches that a run trains on.

    Args:
      config: the settings of the run, resolved.
      dataset: the dataset, split as the settings say.
      part: which part of the rows of each batch to make, from 0.
      parts: number of parts.

    Raises:
      UserError: there is nothing to train or to validate on, or there are too many batches.
    """
    data, train = config.data, config.train
    for split in ("valid", "test"):
        if not (getattr(dataset.splits, split) > 0).any():
            raise UserError(f"{dataset.directory}: no user has events enough for the {split} split")
    settings: dict[str, Any] = dict(
        max_length=data.max_length,
        batch_size=train.batch_size,
        seed=config.seed,
        process_index=part,
        process_count=parts,
    )
    if train.objective == "every_position":
        batches = PackedBatches(
            dataset,
            windows_per_user=data.windows_per_user,
            shuffle_ties=data.shuffle_ties,
            **settings,
        )
    else:
        batches = TrainBatches(
            dataset, convention=data.convention, buckets=data.buckets, **settings
        )
    if train.epochs * batches.batches_per_epoch >= 2**31:
        raise UserError(
            f"config.train.epochs is {train.epochs}, which makes 2^31 steps or more; steps are "
            "counted in 32 bits, so take fewer epochs"
        )
    return batches
