"""Small models of which every part moves the output, made without drawing initial weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tim4rec_jax.models import build

# Compiling is most of the time of these tests.
jit = functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)


def small_model(settings, *, spread, param_dtype=jnp.float32, **sizes):
    """Graph and parameters: random with this standard deviation, about 1 where they are factors.

    The initial weights are tiny or zero, and each shape of them takes a program to draw.
    """
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: build(settings, param_dtype=param_dtype, **sizes))
    )
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        factor = path[-2].key in ("scale", "D")
        return (factor + spread * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return graph, jax.tree.map_with_path(draw, shapes)
