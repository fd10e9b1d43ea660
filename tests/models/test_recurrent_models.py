"""Models that are a recurrence: no future, no other history, the same event by event."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.models import MODELS, build
from tim4rec_jax.training.objectives import every_position_loss, prefix_loss

ITEMS, LENGTH, ROWS = 30, 12, 3
SMALL = dict(hidden_size=16, embedding_size=8, d_state=4, head_dim=8)
jit = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
models = pytest.mark.parametrize("name", ["gru4rec", "lrurec", "mamba4rec", "ssd4rec"])


@functools.cache
def make(name):
    """A model whose every part moves the output: the initial weights are tiny or zero."""
    settings = {key: v for key, v in SMALL.items() if hasattr(MODELS[name].Settings, key)}
    graph, params = nnx.split(build({"name": name, **settings}, n_items=ITEMS, max_length=LENGTH))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(2)
    leaves = [leaf + 0.3 * rng.standard_normal(leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return graph, jax.tree.unflatten(structure, leaves)


def histories():
    return np.random.default_rng(0).integers(1, ITEMS + 1, (ROWS, LENGTH), dtype=np.int32)


@jit
def call(graph, params, items, segment_ids=None):
    lengths = jnp.full(items.shape[0], items.shape[1])
    gaps = jnp.zeros(items.shape)
    return nnx.merge(graph, params)(items, lengths, gaps, segment_ids=segment_ids)


@jit
def encode(graph, params, items, lengths):
    return nnx.merge(graph, params).encode(items, lengths, jnp.zeros(items.shape))


@jit
def all_steps(graph, params, items):
    model = nnx.merge(graph, params)

    def step(state, now):
        return model.step(state, now, jnp.zeros(now.shape))

    return jax.lax.scan(step, model.init_state(len(items)), items.T)[1].swapaxes(0, 1)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5)


@models
def test_sees_no_future_and_all_of_the_past(name):
    model, items = make(name), histories()
    whole = call(*model, items)
    others = items.copy()
    others[:, 7] = others[:, 7] % ITEMS + 1
    moved = np.abs(call(*model, others) - whole).max(axis=(0, 2))
    assert (moved[:7] == 0).all()
    assert (moved[7:10] > 1e-4).all()


@models
def test_segments_are_rows_of_their_own(name):
    model, items = make(name), histories()
    ids = np.sort(np.random.default_rng(1).integers(0, 4, items.shape), axis=1)
    together = call(*model, items, ids)
    for row, segments in enumerate(ids):
        for segment in np.unique(segments):
            own = segments == segment
            alone = np.zeros((ROWS, LENGTH), np.int32)
            alone[0, : own.sum()] = items[row, own]
            close(together[row, own], call(*model, alone)[0, : own.sum()])


@models
def test_one_position_and_steps_are_what_the_whole_row_gives(name):
    model, items = make(name), histories()
    whole = call(*model, items)
    lengths = np.array([1, 12, 7], np.int32)
    close(encode(*model, items, lengths), whole[np.arange(ROWS), lengths - 1])
    close(all_steps(*model, items), whole)


@models
def test_every_position_of_packed_rows_is_every_prefix(name):
    dataset = in_memory(random_histories([9, 4, 7]))
    graph, params = make(name)
    prefixes = TrainBatches(
        dataset, max_length=12, batch_size=11, seed=0, convention="exact", buckets=[12]
    )
    # One batch whose only row holds all three histories uncut.
    rows = PackedBatches(dataset, max_length=12, batch_size=1, seed=0)
    assert prefixes.batches_per_epoch == rows.batches_per_epoch == 1
    losses = [
        jit(lambda graph, params, batch, loss=loss: loss(nnx.merge(graph, params), batch, None))(
            graph, params, {key: value for key, value in batch.items() if key != "users"}
        )
        for loss, batch in ((prefix_loss, prefixes[0]), (every_position_loss, rows[0]))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)
