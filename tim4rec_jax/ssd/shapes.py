"""The shapes at which the op and the block are tested, compiled, timed and tuned."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TAPS = 4  # of the convolution in all released models


class Shape(NamedTuple):
    """A shape of the op or of the block around it, with one group.

    Attributes:
        name: where the shape comes from.
        batch: B.
        length: L.
        heads: H.
        width: P.
        state: N.
        dtype: of what is large: x, B and C of the op, `projected` of the block. Parameters and step
            sizes are float32.
    """

    name: str
    batch: int
    length: int
    heads: int = 4
    width: int = 32
    state: int = 32
    dtype: str = "float32"

    @property
    def inner(self) -> int:
        """I = H P."""
        return self.heads * self.width

    @property
    def mixed(self) -> int:
        """M, the channels of the block's convolution."""
        return self.inner + 2 * self.state

    @property
    def projected(self) -> int:
        """E, the features of the block's `projected`."""
        return self.inner + self.mixed + self.heads

    def op_inputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the inputs of `ssd`."""
        lead = (self.batch, self.length)
        return {
            "x": _array(*lead, self.heads, self.width, dtype=self.dtype),
            "dt": _array(*lead, self.heads),
            "A": _array(self.heads),
            "B": _array(*lead, 1, self.state, dtype=self.dtype),
            "C": _array(*lead, 1, self.state, dtype=self.dtype),
            "D": _array(self.heads),
            "dt_bias": _array(self.heads),
        }

    def block_inputs(self, causal: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the array inputs of `time_aware_ssd_block`.

        Args:
            causal: whether time acts as in the causal layer, else as in the paper's.
        """
        lead = (self.batch, self.length)
        time = ("time_step", "time_rate") if causal else ("time_factor",)
        return {
            "projected": _array(*lead, self.projected, dtype=self.dtype),
            **{name: _array(*lead, self.heads) for name in time},
            "conv_kernel": _array(TAPS, self.mixed),
            "conv_bias": _array(self.mixed),
            "A": _array(self.heads),
            "D": _array(self.heads),
            "dt_bias": _array(self.heads),
            "norm_scale": _array(self.inner),
        }

    def op_bytes(self, gradient: bool) -> int:
        """Returns the bytes that the op must move: each input and output once, in each pass."""
        item = jnp.dtype(self.dtype).itemsize
        wide = self.batch * self.length * self.inner * item
        other = self.batch * self.length * (2 * self.state * item + self.heads * 4)
        return (2 * wide + other) + (3 * wide + 2 * other if gradient else 0)

    def op_operations(self, gradient: bool) -> int:
        """Returns the operations of the recurrence; its gradient is counted as two of it."""
        forward = 5 * self.batch * self.length * self.inner * self.state
        return forward * (3 if gradient else 1)

    def block_bytes(self, gradient: bool, causal: bool = False) -> int:
        """Returns the bytes that the block must move: each input and output once, in each pass."""
        item = jnp.dtype(self.dtype).itemsize
        time = self.heads * 4 * (2 if causal else 1)
        inputs, outputs = self.projected * item + time, self.inner * item
        passes = inputs + outputs + (2 * inputs + outputs if gradient else 0)
        return self.batch * self.length * passes


def random_inputs(inputs: dict[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, jax.Array]:
    """Returns random arrays for `Shape.op_inputs` or `Shape.block_inputs`; A is negative."""
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal(v.shape, np.float32) for name, v in inputs.items()}
    values["A"] = -np.exp(values["A"])
    return {name: jnp.asarray(v, inputs[name].dtype) for name, v in values.items()}


def _array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


# The released models at the batch sizes that they are trained with. Inside the layer, a model of
# 64 features has 4 heads of 32 and a state of 32, and one of 256 has 4 heads of 128 and a state
# of 64.
BEAUTY = Shape("Beauty, KuaiRand 64-d", 2048, 50)
ML_1M = Shape("ML-1M 64-d", 2048, 200)
ML_1M_256 = Shape("ML-1M 256-d", 512, 200, width=128, state=64)
KUAIRAND_256 = Shape("KuaiRand 256-d", 512, 50, width=128, state=64)
LONG = [Shape(f"long, {length}", 2**19 // length, length) for length in (1024, 2048, 4096, 8192)]
WIDE_BLOCK = Shape("P = N = 64", 2048, 200, width=64, state=64)


def in_bfloat16(shape: Shape) -> Shape:
    """Returns the shape with bfloat16 inputs."""
    return shape._replace(name=f"{shape.name}, bfloat16", dtype="bfloat16")


# What is timed on a GPU.
OP_SHAPES = [
    *(BEAUTY, ML_1M, ML_1M_256, KUAIRAND_256, in_bfloat16(BEAUTY), in_bfloat16(ML_1M)),
    *LONG,
]
BLOCK_SHAPES = [BEAUTY, ML_1M, in_bfloat16(BEAUTY), in_bfloat16(ML_1M), WIDE_BLOCK]

# The heads and the state of the 64-d models at few positions, for tests: with chunks of at most 32
# positions the first one is one chunk, and the second one is two.
TRAINED = [Shape(f"as trained, L{length}", 1, length) for length in (20, 40)]
