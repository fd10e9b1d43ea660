"""Initialisers of weights that `flax.nnx.initializers` lacks."""

from typing import Any

import jax
from flax import nnx


def uniform(bound: float) -> nnx.Initializer:
    """Uniform in [-bound, bound]."""

    def init(key, shape, dtype: Any = None, out_sharding=None) -> jax.Array:
        return jax.random.uniform(key, shape, dtype or float, -bound, bound)

    return init
