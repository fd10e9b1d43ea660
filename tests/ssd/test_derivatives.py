"""Gradients written by hand, under all that JAX does to functions."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.ssd.cases import QUICK
from tim4rec_jax.ssd.derivatives import custom_gradient

CALLS = []


def forward(pair, count):
    x, y = pair
    return {"product": jnp.sin(x) * y * count, "sum": x + y}, (x, y, count)


def backward(kept, gradient):
    CALLS.append("backward")
    x, y, count = kept
    d = gradient["product"] * count
    return (d * y * jnp.cos(x) + gradient["sum"], d * jnp.sin(x) + gradient["sum"]), None


ours = custom_gradient(forward, backward)


def plain(pair, count):
    return forward(pair, count)[0]


X, Y, N = np.float64([0.3, 1.2]), np.float64([2.0, -1.0]), np.int32(3)


def loss(function, pair):
    result = function(pair, N)
    return jnp.sum(jnp.cos(result["product"]) + result["sum"] ** 2)


def all_modes(f):
    """What JAX makes of a function: each mode, mapped, and twice."""
    pair = (jnp.asarray(X), jnp.asarray(Y))

    def slope(x, y):
        return jax.grad(lambda x: loss(f, (x, y)))(x)

    return [
        jax.grad(lambda pair: loss(f, pair))(pair),
        jax.grad(lambda pair: loss(jax.checkpoint(f), pair))(pair),
        jax.vmap(slope, (0, None))(X, 0.5),
        jax.vmap(lambda x: jax.jvp(lambda y: f((x, y), N), (0.5,), (x,)))(X),
        jax.grad(lambda pair: jnp.sum(slope(*pair) ** 2))(pair),
        jax.hessian(lambda pair: loss(f, pair))(pair),
    ]


def test_all_modes(x64):
    wanted = jax.jit(lambda: all_modes(plain), compiler_options=QUICK)()
    got = jax.jit(lambda: all_modes(ours), compiler_options=QUICK)()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_reverse_mode_is_the_given_one(x64):
    CALLS.clear()
    jax.eval_shape(lambda: jax.jvp(lambda pair: ours(pair, N), ((X, Y),), ((Y, X),)))
    assert not CALLS
    jax.eval_shape(lambda: jax.grad(lambda pair: loss(ours, pair))((X, Y)))
    assert CALLS
