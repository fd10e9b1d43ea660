"""The arrays that public functions take: those of JAX and those of NumPy."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
