"""Rows count by their weight; every position is every prefix."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tests.training.tiny_run import tiny_config
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.models import SequenceModel, build
from tim4rec_jax.training.losses import cross_entropy
from tim4rec_jax.training.objectives import every_position_loss, prefix_loss

rng = np.random.default_rng(0)
HIDDEN, TABLE = rng.standard_normal((6, 8)), rng.standard_normal((20, 8))
TARGETS = jnp.array([0, 1, 5, 19, 7, 7], jnp.int32)
SPAN = 880_000_000, 880_003_000  # of `random_histories`, in seconds


class Fixed(SequenceModel):
    """Encodes every history as the state it is given for it."""

    def __init__(self):
        self.item_embedding = nnx.Embed(20, 8, rngs=nnx.Rngs(0))
        self.item_embedding.embedding[...] = jnp.asarray(TABLE, jnp.float32)

    def encode(self, items, lengths, gaps, *, dropout_seeds=None):
        return jnp.asarray(HIDDEN, jnp.float32)

    def penalty(self):
        return 0.25


def test_rows_and_the_penalty_count_by_the_weights():
    """The sum is divided by the weights, so that the mean loss has the penalty once."""
    weights = jnp.array([1.0, 0, 1, 1, 0, 1])
    batch = {"targets": TARGETS, "weights": weights, "items": None, "lengths": None, "gaps": None}
    rows = cross_entropy(jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(TABLE, jnp.float32), TARGETS)
    found, expected = prefix_loss(Fixed(), batch, None), rows @ weights + 4 * 0.25
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_every_position_of_packed_rows_is_every_prefix():
    dataset = in_memory(random_histories([9, 4, 7]))
    config = tiny_config("none").model
    config.update(time_encoding="causal", num_layers=2, knows_next_time=True, repeat_bias=True)
    config.update(date_bias_knots=3, repeat_last=True)
    model = build(config, n_items=30, max_length=12, date_range=SPAN)
    model.offset[...] = -0.1
    model.last_offset[...] = jnp.linspace(-0.03, 0.03, 31)
    model.drift.vectors[...] = jax.random.normal(jax.random.key(2), model.drift.vectors.shape)
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
    losses = nnx.jit(  # compiled as a whole, or each operation would be by itself
        lambda model, one, two: (
            prefix_loss(model, one, None),
            every_position_loss(model, two, None),
        )
    )
    by_prefix, at_once = losses(model, *batches)
    np.testing.assert_allclose(at_once, by_prefix, rtol=1e-5)
