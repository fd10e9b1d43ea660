"""The dense layer."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ALL = slice(None)


class Dense(nnx.Module):
    """x W + b over the last axis, initialised as the reference does: N(0, 0.02^2), bias 0.

    All other axes are made one for the product. Its gradient in W then contracts one leading
    axis, which XLA:CPU does in place; contracting two, it would first write a transposed copy
    of the incoming gradient, recomputing what led to it (a tenth of a training step).
    """

    def __init__(self, inputs: int, outputs: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), param_dtype))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (outputs,), param_dtype))
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "*batch I"], outputs: slice = ALL
    ) -> Float[Array, "*batch O"]:
        """The layer in its `dtype`, or only some of its `outputs`, for their share of the cost."""
        kernel = self.kernel[:, outputs].astype(self.dtype)
        bias = self.bias[outputs].astype(self.dtype)
        rows = jnp.dot(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel) + bias
        return rows.reshape(*x.shape[:-1], rows.shape[-1])
