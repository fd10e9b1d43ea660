"""How JAX calls the Triton kernels: on which GPUs, and in tiles of which sizes."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tim4rec_jax.runtime import target

SIZES = (16, 32, 64, 128)  # what P and N may be in a kernel

# Tile sizes by kernel, GPU, number of chunks, size of a state and precision. `python -m
# benchmarks.tune_triton` measures them on the GPU it runs on and names that GPU. The sizes for any
# GPU ("None") were chosen by what the compiler reports: no spills if possible, few instructions
# (`python -m benchmarks.triton_compile`).
TABLE = Path(__file__).with_name("tile_sizes.json")


class TileSizes(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        chunk: positions that are computed at once, a power of two.
        heads: heads of a program, all of one group. A program of the block takes all heads.
        warps: warps of a program.
        stages: loads that the compiler keeps under way.
    """

    chunk: int
    heads: int
    warps: int
    stages: int


def table_key(
    kernel: str, capability: int | None, one_chunk: bool, size: int, precision: str
) -> str:
    """Returns the name of a row of the table, see `tile_sizes`; capability None: any other GPU."""
    return f"{kernel} {capability} {'one' if one_chunk else 'many'} {max(size, 32)} {precision}"


@functools.cache
def read_table() -> dict[str, list[int]]:
    """Returns the rows of `TABLE`."""
    return json.loads(TABLE.read_text())


def tile_sizes(
    kernel: str,
    *,
    length: int,
    heads: int,
    size: int,
    precision: str,
    largest_chunk: int | None = None,
) -> TileSizes:
    """Returns the tile sizes of a kernel for a shape, on the GPU that is compiled for.

    Args:
        kernel: "forward" or "backward", or "block_forward" or "block_backward".
        length: L.
        heads: number of heads of a group.
        size: the larger one of P and N, as the kernel sees them.
        precision: of the products, "ieee", "tf32x3" or "tf32"; for the block what its inputs allow.
        largest_chunk: a limit from the caller; None: no limit.

    Returns:
        Sizes that fit the length and the heads: those measured on this GPU where there are any,
        else those that compile best.
    """
    enough = max(16, 1 << (length - 1).bit_length())
    if largest_chunk is not None:
        enough = min(enough, max(16, 1 << (largest_chunk.bit_length() - 1)))
    one_chunk = length <= enough <= 64
    table = read_table()
    names = [table_key(kernel, c, one_chunk, size, precision) for c in (compute_capability(), None)]
    best = next(TileSizes(*table[name]) for name in names if name in table)
    together = max(n for n in range(1, best.heads + 1) if heads % n == 0)
    return best._replace(chunk=min(best.chunk, enough), heads=together)


_FLOATS = ("float32", "bfloat16", "float16")


def unsupported_reason(
    arrays, width: int, state: int, sizes: tuple[int, ...] = SIZES
) -> str | None:
    """Says what keeps every kernel from running on the GPU that is compiled for.

    Args:
        arrays: everything the kernel reads; None where an array is missing.
        width: P.
        state: N.
        sizes: what P and N may be.

    Returns:
        The reason, or None where there is none.
    """
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed; pip install 'tim4rec-jax[triton]'"
    for dtype in (array.dtype for array in arrays if array is not None):
        if dtype == jnp.float64:
            return "it computes in float32 and an input is float64"
        if jnp.issubdtype(dtype, jnp.floating) and dtype not in _FLOATS:
            return f"it reads {', '.join(_FLOATS)}, and an input is {dtype}"
    for letter, size in (("P", width), ("N", state)):
        if size not in sizes:
            return f"{letter} must be one of {', '.join(map(str, sizes))}, and it is {size}"
    capability = compute_capability()
    if capability is None or capability < 80:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more"
    return None


def compute_capability() -> int | None:
    """Returns the compute capability that is compiled for, 90 for 9.0; None: no NVIDIA GPU."""
    if (capability := target().compute_capability) is not None:
        return capability
    try:
        return round(10 * float(jax.local_devices(backend="cuda")[0].compute_capability))
    except RuntimeError:
        return None


def as_constants(specialisation):
    """Returns the named tuple with each field as a constant of Triton's language.

    Before Triton 3.8, the compiler takes a field of Python's own type in some places only.
    """
    import triton.language as tl

    return type(specialisation)(*map(tl.constexpr, specialisation))


def import_triton_call():
    """Returns `jax_triton.triton_call`, which also works with Triton 3.6, as PyTorch installs it.

    jax-triton 0.4 was written for Triton 3.7. It imports a constant that 3.6 lacks, and where that
    fails, it finds no GPU of NVIDIA's. Only tensor maps need the constant, and no kernel here has
    one.
    """
    from triton.backends.nvidia import driver

    if not hasattr(driver, "TMA_TF32"):
        driver.TMA_TF32 = 0
    from jax_triton import triton_call

    return triton_call


def launch(kernel, inputs, outputs, *, programs: int, specialisation, tiles: TileSizes):
    """Runs a Triton kernel.

    Args:
        kernel: a function under `triton.jit` of the inputs, the outputs, and last of `S`, what it
            is specialised for.
        inputs: arrays and integers.
        outputs: shapes and dtypes of the arrays that the kernel writes.
        programs: size of the grid, which has one axis.
        specialisation: a named tuple of numbers, flags and strings.
        tiles: tile sizes.

    Returns:
        The outputs.
    """
    triton_call = import_triton_call()
    # `out_shape` until jax-triton 0.4.
    parameters = inspect.signature(triton_call).parameters
    out = "out_type" if "out_type" in parameters else "out_shape"
    return triton_call(
        *inputs,
        kernel=kernel,
        name=f"ssd_{kernel.fn.__name__}",
        grid=programs,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        compute_capability=target().compute_capability,
        S=as_constants(specialisation),
        **{out: outputs},
    )
