"""Finds the fastest tile sizes of the Triton kernels on the GPU of this machine.

    python -m benchmarks.tune_triton [--batch 2048] [--sizes 32 64 128] [--repeats 20]

The table `tim4rec_jax/ssd/triton/tile_sizes.json` has a row for every kernel and class of shapes:
one chunk or several, the larger one of P and N, and precision. For each row, all candidates are
timed on one shape. The best is written into the table under the compute capability of this GPU.
Rows of other GPUs stay. A size takes some minutes, most of them for compiling.
"""

import argparse
import itertools
import json
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.ssd_gpu import median_time
from tim4rec_jax.ssd import finite_inputs, ssd, time_aware_ssd_block
from tim4rec_jax.ssd.shapes import BEAUTY, ML_1M, random_inputs
from tim4rec_jax.ssd.triton import block as triton_block
from tim4rec_jax.ssd.triton import launch as table
from tim4rec_jax.ssd.triton import op as triton_op
from tim4rec_jax.ssd.triton.launch import TileSizes, compute_capability

HEADS = BEAUTY.heads
SHAPES = {"one": BEAUTY, "many": ML_1M}
KERNELS = ("forward", "backward", "block_forward", "block_backward")


def candidates(kernel: str, one_chunk: bool) -> list[TileSizes]:
    """Returns sizes worth trying. Rows that fit one chunk may also be cut into chunks of 16."""
    chunks = (16, 64) if one_chunk else (16, 32, 64)
    heads = (HEADS,) if kernel.startswith("block") else (1, 2, 4)
    return [
        TileSizes(*sizes)
        for sizes in itertools.product(chunks, heads, (1, 2, 4, 8, 16), (1, 2))
        # Fewer than two positions for a warp only repeat the work of others.
        if sizes[0] // 16 <= 4 * sizes[2] and sizes[2] <= sizes[0] // 2
    ]


def seconds(
    kernel: str,
    sizes: TileSizes,
    inputs: dict,
    precision: str,
    repeats: int,
    implementation: str = "triton",
) -> float:
    """Median time of the function, or of its gradient for the backward; the other kernel stays.

    Returns infinity for sizes that do not fit the GPU.
    """
    released = table.tile_sizes

    def chosen(name, **options):
        return sizes if name == kernel else released(name, **options)

    def forward(inputs) -> Any:
        if "projected" in inputs:
            state = inputs["norm_scale"].size // HEADS
            return time_aware_ssd_block(
                **inputs, activation="hardswish", state=state, implementation=implementation
            )
        return ssd(**inputs, dt_softplus=True, precision=precision, implementation=implementation)

    def gradient(inputs):
        return jax.grad(lambda inputs: jnp.sum(forward(inputs), dtype=jnp.float32))(inputs)

    function = gradient if kernel.endswith("backward") else forward
    with mock.patch.object(table, "tile_sizes", chosen), finite_inputs():
        try:
            program = jax.jit(function).lower(inputs).compile()
            jax.block_until_ready(program(inputs))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            print(f"  {tuple(sizes)}: {str(error).splitlines()[0][:90]}")
            return float("inf")
    return median_time(lambda: program(inputs), jax.block_until_ready, repeats)


def tune(batch: int, sizes: list[int], repeats: int) -> None:
    """Measures all classes and writes the table after each of them."""
    capability = compute_capability()
    classes = itertools.product(sizes, ("tf32x3", "ieee", "tf32"), SHAPES.items(), KERNELS)
    for size, precision, (chunks, shape), kernel in classes:
        if kernel.startswith("block") and HEADS * size > triton_block.MOST_FEATURES:
            continue
        block = kernel.startswith("block")
        widest = (triton_block if block else triton_op).WIDEST_STATE[kernel]
        exact = size <= widest and (not block or (capability or 0) >= 90)
        # The op is told its precision. The block takes it from the GPU and from what it reads.
        if (precision == "tf32x3" and not exact) or (precision == "ieee" and block and exact):
            continue
        dtype = "bfloat16" if block and precision == "tf32" else "float32"
        shape = shape._replace(batch=batch, width=size, state=size, dtype=dtype)
        inputs = random_inputs(shape.block_inputs() if block else shape.op_inputs(), 0)
        times = {
            tiles: seconds(kernel, tiles, inputs, precision, repeats)
            for tiles in candidates(kernel, chunks == "one")
        }
        best = min(times, key=times.__getitem__)
        name = table.table_key(kernel, capability, chunks == "one", size, precision)
        print(f"{name}: {tuple(best)}, {times[best] * 1e6:.0f} us", flush=True)
        rows = json.loads(table.TABLE.read_text()) | {name: list(best)}
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items())
        table.TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_triton", description=__doc__)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--repeats", type=int, default=20)
    flags = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"an NVIDIA GPU is needed, and this is {jax.default_backend()!r}")
    tune(flags.batch, flags.sizes, flags.repeats)


if __name__ == "__main__":
    main()
