"""Recommenders over untrained models, large enough weights for everything to matter."""

import json
import os
import re

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx

from tests.data.small_dataset import random_histories, write_dataset
from tim4rec_jax import config as config_lib
from tim4rec_jax.models import build
from tim4rec_jax.run import write_date_range, write_settings
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import CompiledModel
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.training.checkpoints import Checkpoints

MAX_LENGTH = 6
LENGTHS = [2, 3, 5, 9, 14, 2, 30, 7]
N_ITEMS = 30
# The environment of processes that tests start: the suite's eight devices take time to make.
ONE_DEVICE = os.environ | {
    "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
}


def tiny_dataset(folder, **kwargs):
    """A prepared dataset with the titles "Title of i1" and so on; i3 has none."""
    dataset = write_dataset(folder, random_histories(LENGTHS), n_items=N_ITEMS, **kwargs)
    table = pq.read_table(dataset / "items.parquet")
    titles = [f"Title of {item}" if item != "i3" else None for item in table["item"].to_pylist()]
    titles = table.append_column("title", pa.array(titles, pa.string()))
    pq.write_table(titles, dataset / "items.parquet")
    return dataset


def tiny_model(dataset, *, seed=0, name="tim4rec", date_range=None, **settings):
    """Settings of a run and its model; `settings` are those of the model called `name`."""
    config = config_lib.default()
    config.dataset, config.data.max_length = str(dataset), MAX_LENGTH
    config_lib.use_model(config, name)
    small = dict(hidden_size=8, head_dim=8, d_state=4, num_layers=1, time_encoding="masked")
    small |= dict(inner_size=8, embedding_size=8, n_layers=1)
    config.model.update({key: v for key, v in small.items() if key in config.model} | settings)
    config = config_lib.resolve(config)
    sizes = dict(n_items=N_ITEMS, max_length=MAX_LENGTH)
    # Shapes alone: to draw initial weights would compile a program for each of them.
    model = nnx.eval_shape(lambda: build(config.model, **sizes, date_range=date_range))
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(seed)

    # On one device by name, as a run is loaded: otherwise every program would be compiled twice.
    def draw(leaf):
        values = rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, jax.devices()[0])

    return config, nnx.merge(graphdef, jax.tree.map(draw, params))


def tiny_recommender(dataset, store=None, **settings):
    config, model = tiny_model(dataset, **settings)
    catalogue = Catalogue(dataset)
    return Recommender(CompiledModel(config, model, catalogue.ids), catalogue, store)


def save_run(workdir, dataset, change=lambda leaf: leaf, **settings):
    """A run directory as train.py leaves it; `change` is applied to all weights."""
    config, model = tiny_model(dataset, **settings)
    config.eval.batch_size = 8
    workdir.mkdir()
    write_settings(config, workdir / "config.json")
    if date_range := settings.get("date_range"):
        write_date_range(workdir, date_range)
    metadata = json.loads((dataset / "dataset.json").read_text())
    (workdir / "dataset.json").write_text(json.dumps(metadata))
    checkpoints = Checkpoints(workdir)
    checkpoints.save_best(1, jax.tree.map(change, nnx.state(model)))
    checkpoints.close()
    return workdir
