"""Finds the fastest block sizes of the Triton kernels on the GPU of this machine.

    python -m benchmarks.tune_triton [--batch 2048] [--sizes 32 64 128] [--repeats 20]

For every class of shapes that `tim4rec_jax.ssd.triton.launch` knows (one chunk or many, the larger one
of P and N, precision) and each kernel, of the op and of the block, all candidates are timed on
one shape and the best is written into the table beside the kernels, `tim4rec_jax/ssd/triton/tile_sizes.json`,
under the compute capability of this GPU. Rows of other GPUs stay. Takes some minutes per size, most
of it compiling.
"""

import argparse
import itertools
import json
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.ssd import ssd, time_aware_ssd_block
from tim4rec_jax.ssd.triton import block as triton_block
from tim4rec_jax.ssd.triton import launch as table
from tim4rec_jax.ssd.triton import op as triton
from tim4rec_jax.ssd.triton.launch import Blocks, compute_capability

HEADS = 4
LENGTHS = {"one": 50, "many": 200}
KERNELS = ("forward", "backward", "block_forward", "block_backward")


def candidates(kernel: str, one_chunk: bool) -> list[Blocks]:
    """Returns sizes worth trying: no more than 64 positions need masks for many chunks."""
    chunks = (64,) if one_chunk else (16, 32, 64)
    heads = (HEADS,) if kernel.startswith("block") else (1, 2, 4)
    return [
        Blocks(*sizes)
        for sizes in itertools.product(chunks, heads, (1, 2, 4, 8, 16), (1, 2))
        # Fewer than two positions for a warp only repeat the work of others.
        if sizes[0] // 16 <= 4 * sizes[2] and sizes[2] <= sizes[0] // 2
    ]


def make_inputs(kernel: str, batch: int, length: int, size: int, dtype: str) -> dict:
    """Returns random inputs of the op or of the block."""
    rng = np.random.default_rng(0)
    lead, inner = (batch, length), HEADS * size
    if kernel.startswith("block"):
        shapes = {
            "projected": (*lead, 2 * inner + 2 * size + HEADS),
            "time_factor": (*lead, HEADS),
            "conv_kernel": (4, inner + 2 * size),
            "conv_bias": (inner + 2 * size,),
            "norm_scale": (inner,),
        }
    else:
        shapes = {
            "x": (*lead, HEADS, size),
            "dt": (*lead, HEADS),
            "B": (*lead, 1, size),
            "C": (*lead, 1, size),
        }
    shapes |= {"D": (HEADS,), "dt_bias": (HEADS,)}
    inputs = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    if "projected" in inputs:
        inputs["projected"] = inputs["projected"].astype(dtype)
    return inputs | {"A": -jnp.exp(jnp.asarray(rng.normal(size=HEADS), jnp.float32))}


def seconds(kernel: str, sizes: Blocks, inputs: dict, precision: str, repeats: int) -> float:
    """Median time of the function, or of its gradient for the backward; the other kernel stays.

    Returns infinity for sizes that do not fit the GPU.
    """

    def chosen(name, *arguments, **options):
        return sizes if name == kernel else table.blocks(name, *arguments, **options)

    def forward(inputs):
        if "projected" in inputs:
            state = inputs["norm_scale"].size // HEADS
            return time_aware_ssd_block(
                **inputs, activation="hardswish", state=state, implementation="triton"
            )
        return ssd(**inputs, dt_softplus=True, precision=precision, implementation="triton")

    def gradient(inputs):
        return jax.grad(lambda inputs: jnp.sum(forward(inputs).astype(jnp.float32)))(inputs)

    function = gradient if kernel.endswith("backward") else forward
    with (
        mock.patch.object(triton, "blocks", chosen),
        mock.patch.object(triton_block, "blocks", chosen),
    ):
        try:
            program = jax.jit(function).lower(inputs).compile()
            jax.block_until_ready(program(inputs))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            print(f"  {tuple(sizes)}: {str(error).splitlines()[0][:90]}")
            return float("inf")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(inputs))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tune(batch: int, sizes: list[int], repeats: int) -> None:
    """Measures all classes and writes the table after each of them."""
    capability = compute_capability()
    classes = itertools.product(sizes, ("ieee", "tf32"), LENGTHS.items(), KERNELS)
    for size, precision, (chunks, length), kernel in classes:
        if kernel.startswith("block") and HEADS * size > triton_block.MOST_FEATURES:
            continue
        # The block takes the precision from what it reads.
        dtype = "float32" if precision == "ieee" else "bfloat16"
        inputs = make_inputs(kernel, batch, length, size, dtype)
        times = {
            blocks: seconds(kernel, blocks, inputs, precision, repeats)
            for blocks in candidates(kernel, chunks == "one")
        }
        best = min(times, key=times.__getitem__)
        name = table.key(kernel, capability, chunks == "one", size, precision)
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
