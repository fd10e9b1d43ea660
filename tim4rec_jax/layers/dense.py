"""The dense layer."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

ALL = slice(None)
NORMAL = nnx.initializers.normal(0.02)


class Dense(nnx.Module):
    """x W + b over the last axis, initialised by default as the reference does: N(0, 0.02^2), 0.

    All other axes are made one for the product. Its gradient in W then contracts one leading
    axis, which XLA:CPU does in place; contracting two, it would first write a transposed copy
    of the incoming gradient, recomputing what led to it (a tenth of a training step).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
        kernel_init=NORMAL,
        bias_init=nnx.initializers.zeros,
        use_bias: bool = True,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (inputs, outputs), param_dtype))
        bias = bias_init(rngs.params(), (outputs,), param_dtype)
        self.bias = nnx.Param(bias) if use_bias else None
        self.dtype = dtype

    def __call__(
        self, x: Float[Array, "*batch I"], outputs: slice = ALL
    ) -> Float[Array, "*batch O"]:
        """The layer in its `dtype`, or only some of its `outputs`, for their share of the cost."""
        kernel = self.kernel[:, outputs].astype(self.dtype)
        rows = jnp.dot(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel)
        if self.bias is not None:
            rows = rows + self.bias[outputs].astype(self.dtype)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])
