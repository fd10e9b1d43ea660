"""The gradient of a lookup as a GPU computes it, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.layers.lookup import add_at, lookup
from tim4rec_jax.runtime import compile_for

# Rows 0 and 8 and some between them are missing, one run goes over half of the positions.
ROWS = np.array([[3, 7, 3, 1, 3, 3], [3, 5, 3, 7, 3, 1]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_on_a_gpu_is_a_sum_over_positions(dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(9, 4)), dtype)
    weights = jnp.asarray(rng.normal(size=(*ROWS.shape, 4)), dtype)

    @jax.jit
    def gradient(table):
        return jax.grad(
            lambda table: jnp.sum(lookup(table, jnp.asarray(ROWS)) * weights, dtype="float32")
        )(table)

    with compile_for("gpu", 90):
        lowered = gradient.trace(table).lower()
        got = lowered.compile()(table)
    assert "stablehlo.scatter" not in lowered.as_text()
    wanted = np.zeros(table.shape)
    np.add.at(wanted, ROWS, np.asarray(weights, np.float64))
    assert got.dtype == table.dtype
    rounding = float(jnp.finfo(table.dtype).eps)  # sums are float32, rounded at the end
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2 * rounding, atol=1e-6)
    np.testing.assert_array_equal(got[jnp.array([0, 2, 4, 6, 8])], 0)


def test_shares_are_added_to_a_table():
    table, shares = np.full((3, 2), 5.0, np.float32), np.ones((4, 2), np.float32)
    rows = jnp.array([2, 0, 2, 2])
    for platform in ("cpu", "gpu"):
        with compile_for(platform, 90):
            got = add_at(jnp.asarray(table), rows, jnp.asarray(shares))
        np.testing.assert_array_equal(got, [[6, 6], [5, 5], [8, 8]])
