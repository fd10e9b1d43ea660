"""Cross-entropy against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tim4rec_jax.training.objective import cross_entropy, prefix_loss

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


class Fixed(nnx.Module):
    """Encodes every history as the state it is given for it."""

    def __init__(self):
        self.item_embedding = nnx.Embed(20, 8, rngs=nnx.Rngs(0))
        self.item_embedding.embedding[...] = jnp.asarray(TABLE, jnp.float32)

    def encode(self, items, lengths, gaps, dropout_seeds):
        return jnp.asarray(HIDDEN, jnp.float32)


def test_rows_count_by_their_weight():
    weights = np.array([1, 0, 1, 1, 0, 1], np.float32)
    batch = {"targets": TARGETS, "weights": weights, "items": None, "lengths": None, "gaps": None}
    rows = cross_entropy(jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(TABLE, jnp.float32), TARGETS)
    np.testing.assert_allclose(prefix_loss(Fixed(), batch, None), rows @ weights, rtol=1e-6)
