"""How JAX calls Triton kernels: on which GPUs, in which tile sizes, for rows wherever they are."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import custom_partitioning

from tim4rec_jax.runtime import target
from tim4rec_jax.ssd.dispatch import widened

# ---- ssd.blocks
# Sizes of the blocks that the Triton kernels work in, by device and shape.

# Rows of a GPU are written by `python -m benchmarks.tune_triton` when it runs there. None have been
# yet: those in it were chosen by what the compiler reports, few registers spilled and few
# instructions (`python -m benchmarks.triton_compile`).
TABLE = Path(__file__).with_name("tile_sizes.json")


class Blocks(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        chunk: positions that are computed at once, a power of two.
        heads: heads of a program, all of one group; programs of the block take all there are.
        warps: warps of a program.
        stages: loads that the compiler keeps under way.
    """

    chunk: int
    heads: int
    warps: int
    stages: int


def key(kernel: str, capability: int | None, one_chunk: bool, size: int, precision: str) -> str:
    """Returns the name of a row of the table, as for `blocks`; None: of a GPU not measured."""
    return f"{kernel} {capability} {'one' if one_chunk else 'many'} {max(size, 32)} {precision}"


@functools.cache
def _table() -> dict[str, list[int]]:
    return json.loads(TABLE.read_text())


def blocks(
    kernel: str,
    capability: int | None,
    *,
    length: int,
    heads: int,
    size: int,
    precision: str,
    largest_chunk: int | None = None,
) -> Blocks:
    """Returns the sizes for a kernel and shape: measured ones, else those that compile best.

    Args:
        kernel: "forward" or "backward", or with "block_" before it.
        capability: compute capability of the GPU, 90 for 9.0.
        length: L.
        heads: of a group.
        size: the larger one of P, as the kernel sees it, and N.
        precision: of the products, "ieee" or "tf32"; for the block what its inputs allow.
        largest_chunk: a limit from the caller.

    Returns:
        Sizes that fit the length and the heads.
    """
    enough = max(16, 1 << (length - 1).bit_length())
    if largest_chunk is not None:
        enough = min(enough, max(16, 1 << (largest_chunk.bit_length() - 1)))
    one_chunk = length <= enough <= 64
    names = (key(kernel, c, one_chunk, size, precision) for c in (capability, None))
    best = next(Blocks(*_table()[name]) for name in names if name in _table())
    together = max(n for n in range(1, best.heads + 1) if heads % n == 0)
    return best._replace(chunk=min(best.chunk, enough), heads=together)


# ---- ssd.triton_launch
# How JAX calls Triton kernels: on which GPUs, and for rows wherever they are.

SIZES = (16, 32, 64, 128)


def unsupported_reason(
    arrays, width: int, state: int, sizes: tuple[int, ...] = SIZES
) -> str | None:
    """Says what keeps all kernels from running on the GPU that is compiled for.

    Args:
        arrays: everything the kernel reads, None among it.
        width: P.
        state: N.
        sizes: that P and N may have.
    """
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed; pip install 'tim4rec-jax[triton]'"
    if any(array is not None and array.dtype == jnp.float64 for array in arrays):
        return "it computes in float32 and an input is float64"
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


def launch(kernel, inputs, outputs, programs, constants, size):
    """Runs a Triton kernel on a grid of one axis; returns its outputs."""
    import jax_triton

    # `out_shape` until jax-triton 0.4.
    parameters = inspect.signature(jax_triton.triton_call).parameters
    out = "out_type" if "out_type" in parameters else "out_shape"
    return jax_triton.triton_call(
        *inputs,
        kernel=kernel,
        name=f"ssd_{kernel.fn.__name__}",
        grid=programs,
        num_warps=size.warps,
        num_stages=size.stages,
        compute_capability=target().compute_capability,
        **{out: outputs},
        **constants,
    )


def shard_over_batch(function):
    """Lets a function of (rows, shared) with results by row be mapped and sharded by rows."""
    return widened(functools.partial(_sharded, function))


def _sharded(function, rows, shared):
    """Calls a function of (rows, shared); rows that lie on several devices stay where they are.

    It is the compiler who knows where that is. On TPUs it does not ask, see `rows.row_by_row`.
    """
    leaves, tree = jax.tree.flatten((rows, shared))
    count = len(jax.tree.leaves(rows))
    results = jax.eval_shape(function, rows, shared)

    def of_leaves(*leaves):
        return tuple(jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves))))

    def partition(mesh, arguments, results):
        axes = arguments[0].sharding.spec[:1]
        by_row, whole = (
            jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            for spec in (axes, ())
        )
        shardings = tuple(by_row if i < count else whole for i in range(len(arguments)))
        return mesh, of_leaves, tuple(by_row for _ in results), shardings

    def factors(index, shape, first="rows"):
        """Names for the axes of an array: only that of the rows is shared with others."""
        return " ".join((first, *(f"{first}{index}x{axis}" for axis in range(1, len(shape)))))

    inputs = [
        factors(i, v.shape) if i < count else factors(i, v.shape, f"whole{i}")
        for i, v in enumerate(leaves)
    ]
    outputs = [factors(f"out{i}", v.shape) for i, v in enumerate(jax.tree.leaves(results))]
    call = custom_partitioning.custom_partitioning(of_leaves)
    call.def_partition(partition, sharding_rule=f"{', '.join(inputs)} -> {', '.join(outputs)}")
    return jax.tree.unflatten(jax.tree.structure(results), call(*leaves))
