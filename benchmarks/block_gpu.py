"""The whole layer between its projections on a GPU: one kernel for each direction, or in parts.

Called by `python -m benchmarks.ssd` after the op, and timed likewise (see `benchmarks.ssd_gpu`).
"parts" is the composition around the op's kernel, "xla" the same without any kernel of ours, "copy"
what a copy on the device takes for the bytes that the block must read and write: each input
and output once, for the gradient those of both passes.
"""

import argparse
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.ssd_gpu import CALLS, time_copy, time_program
from tim4rec_jax.ssd import time_aware_ssd_block

TAPS = 4
IMPLEMENTATIONS = ("triton", "parts", "xla")


class Case(NamedTuple):
    """A shape of the block, with one group."""

    name: str
    batch: int
    length: int
    heads: int = 4
    width: int = 32
    state: int = 32
    dtype: str = "float32"

    @property
    def features(self) -> tuple[int, int, int]:
        """Of z, of the convolution and of the projection: I, M, E."""
        inner = self.heads * self.width
        mixed = inner + 2 * self.state
        return inner, mixed, inner + mixed + self.heads

    def bytes(self, gradient: bool) -> int:
        """Returns what must be read and written at least."""
        inner, _, projected = self.features
        item = jnp.dtype(self.dtype).itemsize
        inputs, outputs = projected * item + self.heads * 4, inner * item
        passes = inputs + outputs + (2 * inputs + outputs if gradient else 0)
        return self.batch * self.length * passes


CASES = [
    Case("Beauty, KuaiRand 64-d", 2048, 50),
    Case("ML-1M 64-d", 2048, 200),
    Case("Beauty, bfloat16", 2048, 50, dtype="bfloat16"),
    Case("ML-1M, bfloat16", 2048, 200, dtype="bfloat16"),
    Case("P = N = 64", 2048, 200, width=64, state=64),
]


def make_inputs(case: Case, seed: int) -> dict[str, jax.Array]:
    """Returns random inputs of the block."""
    rng = np.random.default_rng(seed)
    lead, (inner, mixed, projected) = (case.batch, case.length), case.features
    shapes = {
        "projected": (*lead, projected),
        "time_factor": (*lead, case.heads),
        "conv_kernel": (TAPS, mixed),
        "conv_bias": (mixed,),
        "D": (case.heads,),
        "dt_bias": (case.heads,),
        "norm_scale": (inner,),
    }
    inputs = {k: jnp.asarray(rng.standard_normal(s, np.float32)) for k, s in shapes.items()}
    inputs["projected"] = inputs["projected"].astype(case.dtype)
    return inputs | {"A": -jnp.exp(jnp.asarray(rng.standard_normal(case.heads, np.float32)))}


def time_block(case: Case, sets: list, repeats: int, gradient: bool, implementation: str) -> float:
    """Times the block, or the block and its gradient, in seconds a call."""

    def forward(inputs):
        return time_aware_ssd_block(
            **inputs, activation="hardswish", state=case.state, implementation=implementation
        )

    def both(inputs):
        y, pull = jax.vjp(forward, inputs)
        return y, pull(y)

    return time_program(both if gradient else forward, sets, repeats)


def run(flags: argparse.Namespace) -> None:
    """Measures all cases and prints a table for each."""
    console = Console(width=120)
    for case in CASES:
        table = Table("pass", *(f"{name} us" for name in (*IMPLEMENTATIONS, "copy")))
        table.title = f"block, {case.name}: B {case.batch}, L {case.length}, P {case.width}"
        sets = [make_inputs(case, seed) for seed in range(CALLS)]
        for gradient in (False, True):
            times = [
                time_block(case, sets, flags.repeats, gradient, name) for name in IMPLEMENTATIONS
            ]
            times.append(time_copy(case.bytes(gradient), flags.repeats))
            label = "with gradient" if gradient else "forward"
            table.add_row(label, *(f"{seconds * 1e6:.1f}" for seconds in times))
        console.print(table)
