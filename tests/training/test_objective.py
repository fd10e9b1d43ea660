"""Cross-entropy against its definition, every position against every prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tests.training.tiny_run import tiny_config
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.models import SequenceModel, build
from tim4rec_jax.training import objective
from tim4rec_jax.training.objective import (
    cross_entropy,
    every_position_loss,
    prefix_loss,
    summed_cross_entropy,
)

rng = np.random.default_rng(0)
HIDDEN, TABLE = rng.standard_normal((6, 8)), rng.standard_normal((20, 8))
TARGETS = jnp.array([0, 1, 5, 19, 7, 7], jnp.int32)


def test_is_minus_log_softmax_over_all_rows_and_so_is_its_gradient(x64):
    def plain(hidden, table):
        return -jax.nn.log_softmax(hidden @ table.T)[jnp.arange(6), TARGETS]

    def ours(hidden, table):
        return cross_entropy(hidden, table, TARGETS)

    inputs = jnp.asarray(HIDDEN), jnp.asarray(TABLE)
    np.testing.assert_allclose(ours(*inputs), plain(*inputs), rtol=1e-13)
    weights = jnp.arange(1.0, 7.0)
    gradients = [
        jax.grad(lambda *inputs, f=f: weights @ f(*inputs), argnums=(0, 1))(*inputs)
        for f in (ours, plain)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *gradients)


def test_the_padding_row_counts(x64):
    larger = TABLE.copy()
    larger[0] *= 3
    losses = [cross_entropy(jnp.asarray(HIDDEN), jnp.asarray(t), TARGETS) for t in (TABLE, larger)]
    assert np.all(np.abs(losses[0] - losses[1]) > 1e-6)


def test_bfloat16_scores_add_up_in_float32():
    hidden, table = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(TABLE, jnp.bfloat16)
    loss = cross_entropy(hidden, table, TARGETS)
    assert loss.dtype == jnp.float32
    exact = cross_entropy(hidden.astype(jnp.float32), table.astype(jnp.float32), TARGETS)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)


class Fixed(SequenceModel):
    """Encodes every history as the state it is given for it."""

    def __init__(self):
        self.item_embedding = nnx.Embed(20, 8, rngs=nnx.Rngs(0))
        self.item_embedding.embedding[...] = jnp.asarray(TABLE, jnp.float32)

    def encode(self, items, lengths, gaps, *, dropout_seeds=None):
        return jnp.asarray(HIDDEN, jnp.float32)


def test_rows_count_by_their_weight():
    weights = np.array([1, 0, 1, 1, 0, 1], np.float32)
    batch = {"targets": TARGETS, "weights": weights, "items": None, "lengths": None, "gaps": None}
    rows = cross_entropy(jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(TABLE, jnp.float32), TARGETS)
    np.testing.assert_allclose(prefix_loss(Fixed(), batch, None), rows @ weights, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 8, 40])
def test_in_blocks_it_is_the_same_sum_with_the_same_gradients(rows, x64, monkeypatch):
    monkeypatch.setattr(objective, "_block_rows", lambda items: 8)
    hidden, table = rng.standard_normal((rows, 8)), rng.standard_normal((20, 8))
    targets = jnp.asarray(rng.integers(0, 20, rows))
    weights = jnp.asarray(rng.integers(0, 3, rows), jnp.float64)
    inputs = jnp.asarray(hidden), jnp.asarray(table)

    def plain(hidden, table):
        return 0.5 * weights @ cross_entropy(hidden, table, targets)

    def blocked(hidden, table):
        return 0.5 * summed_cross_entropy(hidden, table, targets, weights)

    np.testing.assert_allclose(blocked(*inputs), plain(*inputs), rtol=1e-12)
    gradients = [jax.grad(f, argnums=(0, 1))(*inputs) for f in (plain, blocked)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *gradients)


def test_scores_of_all_rows_never_exist_at_once():
    hidden, table = jnp.ones((4096, 8)), jnp.ones((5000, 8))
    targets, weights = jnp.zeros(4096, jnp.int32), jnp.ones(4096)
    gradient = jax.jit(jax.grad(summed_cross_entropy, argnums=(0, 1)))
    memory = gradient.lower(hidden, table, targets, weights).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 5000 * 4 / 4


def test_every_position_of_packed_rows_is_every_prefix():
    dataset = in_memory(random_histories([9, 4, 7]))
    config = tiny_config("none").model
    config.update(time_encoding="causal", num_layers=2, knows_next_time=True)
    model = build(config, n_items=30, max_length=12)
    for block in model.blocks:
        kernel = block.modulator.kernel
        kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    prefixes = TrainBatches(
        dataset, max_length=12, batch_size=11, seed=0, convention="exact", buckets=[12]
    )
    # One batch whose only row holds all three histories uncut.
    rows = PackedBatches(dataset, max_length=12, batch_size=1, seed=0)
    assert prefixes.batches_per_epoch == rows.batches_per_epoch == 1
    batches = jax.device_put((prefixes[0], rows[0]))
    by_prefix = prefix_loss(model, batches[0], None)
    at_once = every_position_loss(model, batches[1], None)
    np.testing.assert_allclose(at_once, by_prefix, rtol=1e-5)
