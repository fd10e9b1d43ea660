"""Comparison models learn what can be learnt.

The others' losses and gradients are those of the published code (tests/interop).
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory
from tim4rec_jax import config as config_lib
from tim4rec_jax.data import TrainBatches, train_item_counts
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.models import build, inputs
from tim4rec_jax.training.objectives import mask_batch
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import loss_and_gradients

ITEMS, LENGTH, STEPS = 20, 8, 120
SMALL = dict(hidden_size=16, inner_size=32, n_layers=1, num_layers=1, n_heads=2, head_dim=8)
SMALL |= dict(embedding_size=16, d_state=8, hidden_dropout_prob=0.1, attn_dropout_prob=0.1)
SMALL |= dict(dropout_prob=0.1, time_span=8, time_buckets=32)
LEARNERS = (
    # Masks drawn; in the fast suite test_cloze trains it.
    pytest.param("bert4rec", marks=pytest.mark.slow),
    "hstu",  # no published code
    "caser",  # a penalty
)


@pytest.fixture(scope="module")
def dataset():
    """Every user walks round the items in the same order: the next one is certain."""
    histories = [
        (((start + np.arange(10)) % ITEMS + 1).astype(np.int32), 90 * np.arange(10))
        for start in range(ITEMS)
    ]
    return in_memory(histories, n_items=ITEMS)


@functools.partial(
    jax.jit,
    static_argnames=("graph", "objective"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def step(state, batch, graph, objective):
    key = jax.random.fold_in(state.rng, state.step)
    if objective == "cloze":
        batch = mask_batch(nnx.merge(graph, state.params), batch, key)
    seeds = row_seeds(key, len(batch["items"]))
    loss, gradients = loss_and_gradients(graph, state.params, batch, seeds, 1, objective)
    updates, opt_state = make_optimizer(0.01, 0.0).update(gradients, state.opt_state, state.params)
    params = jax.tree.map(lambda p, u: p + u, state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss


@pytest.mark.parametrize("name", LEARNERS)
def test_the_loss_falls(name, dataset):
    config = config_lib.default()
    config_lib.use_model(config, name)
    config.data.max_length = LENGTH
    config.model.update({key: value for key, value in SMALL.items() if key in config.model})
    config = config_lib.resolve(config)
    model = build(
        config.model,
        n_items=ITEMS,
        n_users=dataset.n_users,
        item_counts=train_item_counts(dataset),
        max_length=LENGTH,
    )
    batches = TrainBatches(
        dataset,
        max_length=LENGTH,
        batch_size=35,
        seed=0,
        convention=config.data.convention,
        buckets=(LENGTH,),
    )
    needed = (*inputs(model), "targets", "weights")
    graph, params = nnx.split(model)
    state, losses = init_state(params, make_optimizer(0.01, 0.0), 0), []
    for number in range(STEPS):
        batch = {key: value for key, value in batches[number].items() if key in needed}
        state, loss = step(state, batch, graph, config.train.objective)
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
