"""The last-position shortcut is the op at `length - 1`, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.ssd import ssd
from tim4rec_jax.ssd.xla import ssd_last

BATCH, LENGTH, HEADS, HEAD, STATE = 5, 13, 4, 3, 6
LENGTHS = jnp.array([1, 2, 7, 12, 13])
ROWS = jnp.arange(BATCH)


def inputs(groups):
    rng = np.random.default_rng(groups)
    shapes = {
        "x": (BATCH, LENGTH, HEADS, HEAD),
        "dt": (BATCH, LENGTH, HEADS),
        "A": (HEADS,),
        "B": (BATCH, LENGTH, groups, STATE),
        "C": (BATCH, LENGTH, groups, STATE),
        "D": (HEADS,),
        "dt_bias": (HEADS,),
    }
    values = {name: jax.device_put(rng.standard_normal(shape)) for name, shape in shapes.items()}
    return values | {"A": -jnp.exp(values["A"])}


def by_op(x, dt, A, B, C, D, dt_bias):
    y = ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, implementation="reference")
    return y[ROWS, LENGTHS - 1]


def shortcut(x, dt, A, B, C, D, dt_bias):
    return ssd_last(x, dt, A, B, C[ROWS, LENGTHS - 1], D, LENGTHS, dt_bias=dt_bias)


def value_and_gradients(function, values):
    # Weights make every output count differently.
    weights = jnp.cos(jnp.arange(BATCH * HEADS * HEAD)).reshape(BATCH, HEADS, HEAD)

    def objective(values):
        y = function(**values)
        return jnp.sum(weights * y), y

    return jax.jit(jax.value_and_grad(objective, has_aux=True))(values)


@pytest.mark.parametrize("groups", [1, 2])
def test_value_and_every_gradient(x64, groups):
    values = inputs(groups)
    (_, expected), expected_gradients = value_and_gradients(by_op, values)
    (_, y), gradients = value_and_gradients(shortcut, values)
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-13)
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-3, name
        np.testing.assert_allclose(
            gradient, expected_gradients[name], rtol=1e-10, atol=1e-12, err_msg=name
        )


def test_what_lies_after_the_length_does_not_count(x64):
    values = inputs(1)
    padding = jnp.arange(LENGTH) >= LENGTHS[:, None]
    (_, y), gradients = value_and_gradients(shortcut, values)
    spoilt = dict(values)
    for name in ("x", "dt", "B"):
        wide = padding.reshape(BATCH, LENGTH, *(1,) * (values[name].ndim - 2))
        spoilt[name] = jnp.where(wide, 1e9, values[name])
        assert not np.any(np.where(wide, gradients[name], 0)), name
    (_, other), others = value_and_gradients(shortcut, spoilt)
    np.testing.assert_array_equal(other, y)
    for name in ("A", "C", "D", "dt_bias"):
        np.testing.assert_allclose(others[name], gradients[name], rtol=1e-12, err_msg=name)


def test_bfloat16_accumulates_in_float32():
    values = {name: value.astype(jnp.float32) for name, value in inputs(1).items()}
    narrow = {name: value.astype(jnp.bfloat16) for name, value in values.items() if name in "xBC"}
    run = jax.jit(shortcut)
    y = run(**(values | narrow))
    assert y.dtype == jnp.bfloat16
    expected = run(**values | {name: value.astype(jnp.float32) for name, value in narrow.items()})
    error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 0.01
