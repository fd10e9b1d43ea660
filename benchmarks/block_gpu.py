"""The whole layer between its projections on a GPU: one kernel for each direction, or in parts.

Called by `python -m benchmarks.ssd` after the op, and timed likewise (see `benchmarks.ssd_gpu`).
"parts" is the composition around the op's kernel, "xla" the same without any kernel of ours, "copy"
what a copy on the device takes for the bytes that the block must read and write: each input
and output once, for the gradient those of both passes.
"""

import argparse

import jax
from rich.console import Console
from rich.table import Table

from benchmarks.ssd_gpu import input_sets, time_copy, time_program
from tim4rec_jax.ssd import time_aware_ssd_block
from tim4rec_jax.ssd.shapes import BLOCK_SHAPES, Shape

IMPLEMENTATIONS = ("triton", "parts", "xla")


def time_block(
    shape: Shape, sets: list, repeats: int, gradient: bool, implementation: str, **options
) -> float:
    """Times the block, or the block and its gradient, in seconds a call."""

    def forward(inputs):
        settings = {"activation": "hardswish", "state": shape.state} | options
        return time_aware_ssd_block(**inputs, **settings, implementation=implementation)

    def both(inputs):
        y, pull = jax.vjp(forward, inputs)
        return y, pull(y)

    return time_program(both if gradient else forward, sets, repeats)


def run(flags: argparse.Namespace) -> None:
    """Measures all cases and prints a table for each."""
    console = Console(width=120)
    for shape in BLOCK_SHAPES:
        table = Table("pass", *(f"{name} us" for name in (*IMPLEMENTATIONS, "copy")))
        table.title = f"block, {shape.name}: B {shape.batch}, L {shape.length}, P {shape.width}"
        sets = input_sets(shape.block_inputs())
        for gradient in (False, True):
            times = [
                time_block(shape, sets, flags.repeats, gradient, name) for name in IMPLEMENTATIONS
            ]
            times.append(time_copy(shape.block_bytes(gradient), flags.repeats))
            label = "with gradient" if gradient else "forward"
            table.add_row(label, *(f"{seconds * 1e6:.1f}" for seconds in times))
        console.print(table)
