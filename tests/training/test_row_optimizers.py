"""Optimizers of rows against the dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tim4rec_jax.training.row_optimizers import OPTIMIZERS, update_rows

TABLE = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
PLACES = [[0, 2, 5, 7, 7], [2, 3, 7, 7, 7], [0, 1, 2, 5, 6]]


def steps(name, places, gradients, **settings):
    """The table after each step, and the last state."""
    optimizer, tables = OPTIMIZERS[name], []
    table = jnp.asarray(TABLE)
    state = optimizer.init(table)
    update = jax.jit(
        lambda table, state, places, gradients, count: update_rows(
            optimizer, table, state, places, gradients, rate=0.1, count=count, **settings
        )
    )
    for count, (at, gradient) in enumerate(zip(places, gradients, strict=True), 1):
        table, state = update(table, state, jnp.array(at), gradient, jnp.int32(count))
        tables.append(np.asarray(table))
    return tables, state


def gradients(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def test_lazy_adam_is_adam_where_all_rows_have_gradients():
    given = gradients(4, 7, 3)
    found, _ = steps("lazy_adam", [range(7)] * 4, given, weight_decay=0.01)
    tx = optax.chain(optax.add_decayed_weights(0.01), optax.adam(0.1))
    table = jnp.asarray(TABLE)
    state, update = tx.init(table), jax.jit(tx.update)
    for gradient, ours in zip(given, found, strict=True):
        updates, state = update(gradient, state, table)
        table = optax.apply_updates(table, updates)
        # Both round some ten operations on numbers of the size of the learning rate.
        np.testing.assert_allclose(ours, table, atol=20 * 2**-24)


def test_lazy_adam_leaves_other_rows_and_their_means_alone():
    given = gradients(3, 5, 3)
    found, _ = steps("lazy_adam", PLACES, given)
    table, mean, square = TABLE.astype(np.float64), np.zeros((7, 3)), np.zeros((7, 3))
    for count, (places, gradient) in enumerate(zip(PLACES, given, strict=True), 1):
        for place, row in zip(places, gradient.astype(np.float64), strict=True):
            if place == 7:
                continue
            mean[place] = 0.9 * mean[place] + 0.1 * row
            square[place] = 0.999 * square[place] + 0.001 * row**2
            root = np.sqrt(square[place] / (1 - 0.999**count)) + 1e-8
            table[place] -= 0.1 * mean[place] / (1 - 0.9**count) / root
        np.testing.assert_allclose(found[count - 1], table, atol=1e-5)
    assert (found[-1][4] == TABLE[4]).all()


@pytest.mark.parametrize("every_row", [False, True])
def test_adagrad_by_row_is_the_dense_update(every_row):
    """A row without a gradient is one whose gradient is zero."""
    given = gradients(3, 5, 3)
    dense = np.zeros((3, 8, 3), np.float32)
    for step, places in enumerate(PLACES):
        dense[step, places] = given[step]
    if every_row:
        found, state = steps("adagrad", [range(7)] * 3, dense[:, :7])
    else:
        found, state = steps("adagrad", PLACES, given)
    squares = np.cumsum((dense[:, :7].astype(np.float64) ** 2).mean(-1), axis=0)
    moved = np.cumsum(0.1 * dense[:, :7] / (np.sqrt(squares)[..., None] + 1e-8), axis=0)
    np.testing.assert_allclose(found, TABLE - moved, atol=1e-6)
    np.testing.assert_allclose(state["sum"], squares[-1], rtol=1e-6)
