"""A training that takes seconds: its settings, a quick model, a logger, its sudden end."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax import config as config_lib
from tim4rec_jax.data import TrainBatches
from tim4rec_jax.data.pipeline import train_iterator
from tim4rec_jax.layers import dropout
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.models.base import DataSizes, ModelSettings
from tim4rec_jax.run import load_model
from tim4rec_jax.training import dispatch
from tim4rec_jax.training.state import TrainState, init_state, make_optimizer

MAX_LENGTH = 12
MODEL = dict(hidden_size=16, num_layers=1, head_dim=8, d_state=8)


class LastItem(SequenceModel):
    """Predicts from the vector of the last item and its gap, with dropout, and compiles quickly.

    It is for tests of what training does with any model.
    """

    causal = True

    def __init__(self, settings, sizes, *, rngs, param_dtype: Any = jnp.float32):
        init = nnx.initializers.normal(0.2)
        super().__init__(
            settings, sizes, width=8, rngs=rngs, param_dtype=param_dtype, embedding_init=init
        )

    def __call__(self, items, lengths, gaps, *, segment_ids=None, dropout_seeds=None):
        scale = 1 + jnp.log1p(jnp.abs(gaps[:, : items.shape[1]]))
        return dropout(self.item_embedding(items), 0.3, dropout_seeds) * scale[..., None]


class Recorder:
    """A logger that keeps what it is told; `calls` belongs to all of them."""

    calls: ClassVar[list] = []

    def start(self, settings, workdir, step):
        self.calls.append(("start", settings.get("train.epochs"), workdir, step))

    def log(self, metrics, step):
        self.calls.append(("log", dict(metrics), step))

    def finish(self, result):
        self.calls.append(("finish", result))


def last_item(n_items=30):
    return LastItem(ModelSettings(), DataSizes(n_items, MAX_LENGTH), rngs=nnx.Rngs(0))


def tiny_config(dataset, **train):
    """Settings for the prepared dataset in the directory `dataset`."""
    config = config_lib.default()
    config.dataset = str(dataset)
    config.data.update(max_length=MAX_LENGTH, buckets=(MAX_LENGTH,))
    config.model.update(MODEL)
    config.train.update({"batch_size": 16, "epochs": 2} | train)
    config.eval.batch_size = 16
    return config


def quick_config(dataset, **train):
    """The same with `LastItem` for a model."""
    config = tiny_config(dataset)
    config_lib.use_model(config, f"{__name__}:LastItem")
    config.train.update(train)
    return config


def state(step, value) -> TrainState:
    """The state of a training of one small layer; all its arrays hold the value."""
    params = nnx.state(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Param)
    fresh = init_state(params, make_optimizer(1e-3, 0.0), seed=value)
    params, opt_state = jax.tree.map(
        lambda leaf: jnp.full_like(leaf, value), (params, fresh.opt_state)
    )
    return fresh.replace(
        step=jnp.int32(step), params=params, opt_state=opt_state, loss_sum=jnp.float32(value)
    )


def iterator(position):
    """Training batches from a position on."""
    batches = TrainBatches(
        in_memory(random_histories([20] * 5)),
        max_length=6,
        batch_size=4,
        seed=0,
        convention="exact",
        buckets=(6,),
    )
    return train_iterator(batches, start_batch=position, threads=0)


def parameters(workdir):
    return nnx.to_pure_dict(nnx.state(load_model(workdir)[1], nnx.Param))


def die_at(call, monkeypatch):
    """Has the dispatch of steps fail once, at the given call."""
    calls = iter(range(1, 1000))

    for kind in (dispatch.HostSteps, dispatch.DeviceSteps):

        def dying(self, *args, run=kind.run):
            if next(calls) == call:
                raise RuntimeError("killed")
            return run(self, *args)

        monkeypatch.setattr(kind, "run", dying)
