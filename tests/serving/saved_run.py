"""A run directory as train.py leaves it, with its dataset and weights nobody trained."""

import jax
from flax import nnx

from tests.data.small_dataset import random_histories, write_dataset
from tim4rec_jax import config as config_lib
from tim4rec_jax.models import build
from tim4rec_jax.training.checkpoints import Checkpoints

N_ITEMS = 30
MAX_LENGTH = 8


def save_run(folder, *, seed=3, **model):
    """Writes `folder/data` and `folder/run`; `model` changes settings of the model."""
    dataset = write_dataset(folder / "data", random_histories([3, 5, 8, 13]), n_items=N_ITEMS)
    config = config_lib.default()
    config.dataset = str(dataset)
    config.data.max_length = MAX_LENGTH
    small = dict(hidden_size=16, head_dim=8, d_state=4, num_layers=2)
    config.model.update(small | model)
    config = config_lib.resolve(config)
    workdir = folder / "run"
    workdir.mkdir()
    config_lib.write(config, workdir / "config.json")
    built = build(config.model, n_items=N_ITEMS, max_length=MAX_LENGTH, seed=seed)
    # Initial weights hardly tell one history from another.
    params = jax.tree.map(lambda leaf: 5 * leaf, nnx.state(built, nnx.Param))
    checkpoints = Checkpoints(workdir)
    checkpoints.save_best(1, params)
    checkpoints.close()
    return workdir
