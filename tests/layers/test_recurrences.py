"""Recurrences and convolutions with gradients of their own, against what JAX derives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ssd.cases import QUICK
from tim4rec_jax.layers.gru import gru, gru_step
from tim4rec_jax.layers.lru import Complex, linear_recurrence
from tim4rec_jax.models.caser import correlate

LENGTH, ROWS, WIDTH = 7, 2, 3
STARTS = jnp.array([[0, 0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0]], bool).T


def same(ours, plain, *arguments):
    """Two functions have the same values and gradients of a sum of cosines."""

    def run(function):
        def objective(*arguments):
            values = function(*arguments)
            return sum(jnp.cos(value).sum() for value in jax.tree.leaves(values)), values

        count = tuple(range(len(arguments)))
        run = jax.jit(jax.value_and_grad(objective, count, has_aux=True), compiler_options=QUICK)
        return jax.tree.leaves(run(*arguments))

    for a, b in zip(run(ours), run(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def normal(*shape):
    return jax.device_put(np.random.default_rng(sum(shape)).standard_normal(shape))


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one history", "histories"])
@pytest.mark.parametrize("implementation", ["loop", "associative"])
def test_linear_recurrence(x64, implementation, starts):
    def plain(decay, inputs):
        decay, inputs = (x.real + 1j * x.imag for x in (decay, inputs))
        h, states = jnp.zeros_like(inputs[0]), []
        for t in range(LENGTH):
            h = h if starts is None else jnp.where(starts[t][:, None], 0, h)
            h = decay * h + inputs[t]
            states.append(h)
        states = jnp.stack(states)
        return Complex(states.real, states.imag)

    def ours(decay, inputs):
        return linear_recurrence(decay, inputs, starts, implementation)

    decay = Complex(normal(WIDTH) / 3, normal(WIDTH + 1)[1:] / 3)
    inputs = Complex(normal(LENGTH, ROWS, WIDTH), normal(LENGTH + 1, ROWS, WIDTH)[1:])
    same(ours, plain, decay, inputs)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one history", "histories"])
def test_gru(x64, starts):
    def plain(inputs, kernel):
        h, states = jnp.zeros((ROWS, WIDTH)), []
        for t in range(LENGTH):
            h = h if starts is None else jnp.where(starts[t][:, None], 0, h)
            h = gru_step(inputs[t], h, kernel)
            states.append(h)
        return jnp.stack(states)

    inputs, kernel = normal(LENGTH, ROWS, 3 * WIDTH), normal(WIDTH, 3 * WIDTH)
    same(functools.partial(gru, starts=starts), plain, inputs, kernel)


def test_gru_step_by_its_formulas(x64):
    x, h, kernel = normal(ROWS, 3 * WIDTH), normal(ROWS, WIDTH), normal(WIDTH, 3 * WIDTH)
    x_r, x_u, x_n = np.split(x, 3, axis=1)
    h_r, h_u, h_n = np.split(h @ kernel, 3, axis=1)
    r, u = 1 / (1 + np.exp(-x_r - h_r)), 1 / (1 + np.exp(-x_u - h_u))
    expected = (1 - u) * np.tanh(x_n + r * h_n) + u * h
    np.testing.assert_allclose(gru_step(x, h, kernel), expected, rtol=1e-12)


@pytest.mark.parametrize("width", [1, 3, 6, 8])
def test_correlate(x64, width):
    def plain(x, kernel):
        positions = x.shape[1] - width + 1
        return sum(x[:, w : w + positions] @ kernel[w] for w in range(width))

    same(correlate, plain, normal(ROWS, 8, 4), normal(width, 4, WIDTH))
