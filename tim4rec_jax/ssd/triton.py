"""The SSD on NVIDIA GPUs: the kernels of `triton_kernels` as a differentiable JAX function."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import custom_partitioning

from tim4rec_jax.ssd.blocks import Blocks, blocks
from tim4rec_jax.ssd.dispatch import target
from tim4rec_jax.ssd.rows import widened

SIZES = (16, 32, 64, 128)
# Compute capabilities with 160 KiB of shared memory and more; the others have 99.
LARGE_SHARED_MEMORY = (80, 87, 90, 100, 101, 103)


class Rows(NamedTuple):
    """Arrays with an axis for the batch, their first."""

    x: Any
    dt: Any
    B: Any
    C: Any
    initial: Any = None
    segments: Any = None


class Shared(NamedTuple):
    """Parameters that all rows share."""

    A: Any
    D: Any = None
    bias: Any = None


class Options(NamedTuple):
    """What is known when a program is traced."""

    softplus: bool
    limit: tuple[float, float]
    final: bool
    chunk_size: int | None
    precision: str


def obstacle(v) -> str | None:
    """Says what keeps `ssd_triton` from running on the GPU that is compiled for."""
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed; pip install 'tim4rec-jax[triton]'"
    arrays = (v.x, v.dt, v.A, v.B, v.C, v.D, v.dt_bias, v.initial_state)
    if any(array is not None and array.dtype == jnp.float64 for array in arrays):
        return "it computes in float32 and an input is float64"
    for letter, size in (("P", v.x.shape[-1]), ("N", v.B.shape[-1])):
        if size not in SIZES:
            return f"{letter} must be one of {', '.join(map(str, SIZES))}, and it is {size}"
    capability = compute_capability()
    if capability is None or capability < 80:
        return "it needs an NVIDIA GPU of compute capability 8.0 or more"
    if v.x.shape[-1] * v.B.shape[-1] > 64 * 128 and capability not in LARGE_SHARED_MEMORY:
        return "P = N = 128 takes more shared memory than this GPU gives a program"
    return None


def compute_capability() -> int | None:
    """Returns the compute capability that is compiled for, 90 for 9.0; None: no NVIDIA GPU."""
    if (capability := target().compute_capability) is not None:
        return capability
    try:
        return round(10 * float(jax.local_devices(backend="cuda")[0].compute_capability))
    except RuntimeError:
        return None


def ssd_triton(v):
    """Computes `ssd` of its arguments.

    Args:
        v: `tim4rec_jax.ssd.api.Arguments` that meet no `obstacle`.

    Returns:
        The outputs, and the state after the last position or None if it is not asked for.
    """
    precision = "tf32" if all(a.dtype.itemsize == 2 for a in (v.x, v.B, v.C)) else v.precision
    return _ssd(
        Rows(v.x, v.dt, v.B, v.C, v.initial_state, v.segment_ids),
        Shared(v.A, v.D, v.dt_bias),
        Options(v.dt_softplus, tuple(v.dt_limit), v.return_final_state, v.chunk_size, precision),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ssd(rows, shared, options):
    return _by_rows(functools.partial(_forward, options=options))(rows, shared)


def _ssd_forward(rows, shared, options):
    return _ssd(rows, shared, options), (rows, shared)


def _ssd_backward(options, residuals, cotangents):
    rows, shared = residuals
    gradients = _by_rows(functools.partial(_backward, options=options))((rows, cotangents), shared)
    drows, dA, dD = gradients
    dbias = None if shared.bias is None else jnp.sum(drows.dt, axis=(0, 1))
    dD = None if shared.D is None else jnp.sum(dD, axis=(0, 1))
    dshared = Shared(jnp.sum(dA, axis=(0, 1)), dD, dbias)

    def like(gradient, value):
        return None if gradient is None else gradient.astype(value.dtype)

    return Rows(*map(like, drows, rows)), Shared(*map(like, dshared, shared))


_ssd.defvjp(_ssd_forward, _ssd_backward)


def _by_rows(function):
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


def _forward(rows, shared, options):
    batch, length, heads, width = rows.x.shape
    size, constants = _configuration("forward", rows, shared, options)
    nothing = jax.ShapeDtypeStruct((1,), jnp.float32)
    state = jax.ShapeDtypeStruct((batch, heads, width, rows.B.shape[-1]), jnp.float32)
    y, final = launch(
        "forward",
        (*_inputs(rows, shared), length),
        (jax.ShapeDtypeStruct(rows.x.shape, rows.x.dtype), state if options.final else nothing),
        batch * heads // size.heads,
        constants,
        size,
    )
    return y, final if options.final else None


def _backward(rows_and_cotangents, shared, options):
    rows, (dy, dfinal) = rows_and_cotangents
    batch, length, heads, width = rows.x.shape
    groups, state = rows.B.shape[2:]
    size, constants = _configuration("backward", rows, shared, options)
    chunks = 1 if constants["ONE_CHUNK"] else -(-length // size.chunk)
    parts = heads // size.heads

    def array(*shape, dtype=jnp.float32, needed=True):
        return jax.ShapeDtypeStruct(shape if needed else (1,), dtype)

    # Where one program has all heads of a group, its share is the gradient.
    dtypes = [jnp.float32 if parts > groups else v.dtype for v in (rows.B, rows.C)]
    per_head = () if shared.D is None else (batch, chunks, *shared.D.shape)
    outputs = {
        "dx": array(*rows.x.shape, dtype=rows.x.dtype),
        "ddt": array(*rows.dt.shape),
        "dA": array(batch, chunks, heads),
        "dB": array(batch, length, parts, state, dtype=dtypes[0]),
        "dC": array(batch, length, parts, state, dtype=dtypes[1]),
        "dD": array(*per_head, needed=shared.D is not None),
        "dinitial": array(batch, heads, width, state, needed=rows.initial is not None),
        "scratch": array(batch, chunks, heads, state, width, needed=chunks > 1),
    }
    inputs = (*_inputs(rows, shared), dy, shared.A if dfinal is None else dfinal, length)
    results = launch("backward", inputs, tuple(outputs.values()), batch * parts, constants, size)
    results = dict(zip(outputs, results, strict=True))

    def of_groups(shares):
        return jnp.sum(shares.reshape(batch, length, groups, parts // groups, state), axis=3)

    drows = Rows(
        results["dx"],
        results["ddt"],
        of_groups(results["dB"]),
        of_groups(results["dC"]),
        None if rows.initial is None else results["dinitial"],
    )
    return drows, results["dA"], None if shared.D is None else results["dD"]


def _inputs(rows, shared):
    """The kernels' inputs; what is missing is replaced by something that they will not read."""
    inputs = (rows.x, rows.dt, shared.A, rows.B, rows.C)
    optional = (shared.D, shared.bias, rows.initial, rows.segments)
    return (*inputs, *(shared.A if v is None else v for v in optional))


def _configuration(kernel, rows, shared, options) -> tuple[Blocks, dict]:
    """Returns sizes of blocks, and what kernels are specialised for."""
    length, heads, width = rows.x.shape[1:]
    groups, state = rows.B.shape[2:]
    size = blocks(
        kernel,
        compute_capability(),
        length=length,
        heads=heads // groups,
        size=max(width, state),
        precision=options.precision,
        largest_chunk=options.chunk_size,
    )
    limited = options.limit != (0.0, float("inf"))
    return size, {
        "H": heads,
        "G": groups,
        "P": width,
        "N": state,
        "Q": size.chunk,
        "HEADS": size.heads,
        "ONE_CHUNK": length <= size.chunk,
        "HAS_D": shared.D is not None,
        "D_PER_CHANNEL": shared.D is not None and shared.D.ndim == 2,
        "HAS_BIAS": shared.bias is not None,
        "HAS_INITIAL": rows.initial is not None,
        "HAS_SEGMENTS": rows.segments is not None,
        "HAS_FINAL": options.final,
        "SOFTPLUS": options.softplus,
        "LIMITED": limited,
        "LOW": float(options.limit[0]) if limited else 0.0,
        "HIGH": float(options.limit[1]) if limited else 0.0,
        "PRECISION": options.precision,
    }


def launch(kernel, inputs, outputs, programs, constants, size):
    """Runs a kernel of `triton_kernels` on a grid of one axis; returns its outputs."""
    import jax_triton

    from tim4rec_jax.ssd import triton_kernels

    # `out_shape` until jax-triton 0.4.
    parameters = inspect.signature(jax_triton.triton_call).parameters
    out = "out_type" if "out_type" in parameters else "out_shape"
    return jax_triton.triton_call(
        *inputs,
        kernel=getattr(triton_kernels, kernel),
        name=f"ssd_{kernel}",
        grid=programs,
        num_warps=size.warps,
        num_stages=size.stages,
        compute_capability=target().compute_capability,
        **{out: outputs},
        **constants,
    )
