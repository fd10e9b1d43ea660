"""MovieLens-100K (5-core): 943 users, 1,349 items, 99,287 events."""

from ml_collections import ConfigDict

from tim4rec_jax import config as config_lib


def get_config(variant: str = "") -> ConfigDict:
    """Settings of the run."""
    config = config_lib.default()
    config.dataset = "data/ml-100k"
    config.train.batch_size = 256
    config.train.patience = 5
    return config
