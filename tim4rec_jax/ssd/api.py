"""The SSD operator: its public functions, what its implementations share, and the choice of one."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tim4rec_jax.ssd import finite
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.dispatch import Implementation, choose
from tim4rec_jax.ssd.reference import ssd_reference, step
from tim4rec_jax.ssd.segments import starts
from tim4rec_jax.ssd.triton import op as triton
from tim4rec_jax.ssd.xla import ssd_xla


class Arguments(NamedTuple):
    """The arguments of `ssd`, which every implementation is a function of."""

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    dt_bias: jax.Array | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    initial_state: jax.Array | None
    segment_ids: jax.Array | None
    return_final_state: bool  # if not, an implementation may return None for the state
    chunk_size: int | None
    precision: str


def _from_decays(compute):
    """Makes an implementation from a function of step sizes and decays that are ready to use."""

    def implementation(v: Arguments):
        dtype = _accumulator(v.x, v.dt, v.A, v.B, v.C, v.D, v.dt_bias, v.initial_state)
        x, B, C = (array.astype(dtype) for array in (v.x, v.B, v.C))
        dt, log_decay = _steps(v, dtype)
        state = None if v.initial_state is None else v.initial_state.astype(dtype)
        y, state = compute(x, dt, log_decay, B, C, state, v.chunk_size)
        return _skip(y, x, v.D).astype(v.x.dtype), state

    return implementation


def _steps(v: Arguments, dtype):
    """Step sizes and logarithms of decays, ready to use; -inf where a segment starts."""
    dt = _step_size(v.dt.astype(dtype), v.dt_bias, v.dt_softplus, v.dt_limit)
    log_decay = dt * v.A.astype(dtype)
    if v.segment_ids is not None:
        log_decay = jnp.where(starts(v.segment_ids)[..., None], -jnp.inf, log_decay)
    return dt, log_decay


def _tpu() -> Any:
    # Late, because Pallas takes a tenth of the time that all imports take.
    from tim4rec_jax.ssd.tpu import op

    return op


# The choice of None: the first that prefers the platform and can run, else "xla".
IMPLEMENTATIONS = {
    "reference": Implementation(_from_decays(ssd_reference)),
    "xla": Implementation(_from_decays(ssd_xla)),
    "triton": Implementation(triton.ssd_triton, "gpu", triton.unsupported_reason),
    "tpu": Implementation(
        lambda v: _tpu().ssd_tpu(*_steps(v, jnp.float32), v),
        "tpu",
        lambda v: _tpu().unsupported_reason(v),
    ),
}


def ssd(
    x: Float[AnyArray, "B L H P"],
    dt: Float[AnyArray, "B L H"],
    A: Float[AnyArray, " H"],
    B: Float[AnyArray, "B L G N"],
    C: Float[AnyArray, "B L G N"],
    D: Float[AnyArray, " H"] | Float[AnyArray, "H P"] | None = None,
    *,
    dt_bias: Float[AnyArray, " H"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[int | float, int | float] = (0.0, float("inf")),
    initial_state: Float[AnyArray, "B H P N"] | None = None,
    segment_ids: Int[AnyArray, "B L"] | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    precision: str = "tf32x3",
    implementation: str | None = None,
) -> Float[Array, "B L H P"] | tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """State-space dual operator of Mamba-2 (arXiv 2405.21060), core of TiM4Rec (arXiv 2409.16182).

    `h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]` and `y[t] = C[t] h[t] + D x[t]` for every head.
    Sums and states are float32, or float64 as soon as one input is.

    What stands after a position never changes its output or a gradient, NaN and infinities
    included; nor does what stands in another segment. From the first such number of a segment to
    the segment's end, all outputs are NaN. Looking for them takes about a tenth of the time, see
    `finite_inputs`.

    Reverse mode works with every implementation. Forward mode (`jax.jvp`, `jax.linearize`) and
    symbolic shapes (`jax.export`) work with "reference" and "xla"; the kernels "triton" and "tpu"
    have neither, so pass `implementation="xla"` there.

    Args:
        x: inputs.
        dt: step sizes, one per position and head.
        A: decay rate of each head, negative in a stable model.
        B: input projections; head `h` uses group `h // (H / G)`.
        C: output projections, grouped like `B`.
        D: weight of the skip connection; None: none.
        dt_bias: added to `dt` first.
        dt_softplus: whether softplus is applied to `dt` next.
        dt_limit: smallest and largest `dt`, applied last; `(0, inf)` changes nothing.
        initial_state: the state before the first position, zeros if None.
        segment_ids: the state starts from zeros where the id differs from the one before, also
            where an id comes back. The first segment starts from `initial_state`. None: one
            segment.
        return_final_state: whether the state after the last position is returned as well.
        chunk_size: positions per quadratic block, for implementations with blocks; None chooses.
        precision: of products of float32 matrices. "tf32x3" is nearly float32: each product is
            three of tensor cores, with an error of at most 2e-6 of the norm. "ieee" is float32.
            "tf32" has 10 bits of fraction. An implementation that gains no speed by it computes
            with more digits.
        implementation: a name in `IMPLEMENTATIONS`, see `Implementation`; None chooses the best
            for the platform.

    Returns:
        `y` in the dtype of `x`, or `y` and the final state in the dtype of the sums.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation cannot run.
    """
    arrays = _arrays(
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        dt_bias=dt_bias,
        initial_state=initial_state,
        segment_ids=segment_ids,
    )
    _check_arrays("BL", **arrays)
    _check_options(dt_limit, chunk_size, precision)
    arguments = Arguments(
        **arrays,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_state=return_final_state,
        chunk_size=chunk_size,
        precision=precision,
    )
    chosen = choose(IMPLEMENTATIONS, implementation, arguments)
    arguments, mark = _without_bad(arguments)
    y, state = chosen.compute(arguments)
    if not return_final_state:
        return mark(y)
    # The state is spoilt where an output of the last position would be.
    return mark(y), mark(state[:, None], last=True)[:, 0]


def _without_bad(v: Arguments):
    """Applies `finite.guard` to the arguments."""
    dt = v.dt
    if v.dt_softplus and not finite.known():  # it makes 0 of -inf and of the lowest number alike
        dt = jnp.maximum(dt, jnp.finfo(dt.dtype).min)
    rows = {"x": v.x, "dt": dt, "B": v.B, "C": v.C}
    rows, initial_state, mark = finite.guard(rows, v.segment_ids, v.initial_state)
    return v._replace(**rows, initial_state=initial_state), mark


def ssd_step(
    state: Float[AnyArray, "B H P N"],
    x: Float[AnyArray, "B H P"],
    dt: Float[AnyArray, "B H"],
    A: Float[AnyArray, " H"],
    B: Float[AnyArray, "B G N"],
    C: Float[AnyArray, "B G N"],
    D: Float[AnyArray, " H"] | Float[AnyArray, "H P"] | None = None,
    *,
    dt_bias: Float[AnyArray, " H"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[int | float, int | float] = (0.0, float("inf")),
) -> tuple[Float[Array, "B H P N"], Float[Array, "B H P"]]:
    """Advances `ssd` by one position; the arguments mean what they mean there.

    Args:
        state: the state before the position.
        x: its input.
        dt: its step sizes.
        A: decay rates.
        B: input projection.
        C: output projection.
        D: weight of the skip connection; None: none.
        dt_bias: added to `dt` first.
        dt_softplus: whether softplus is applied to `dt` next.
        dt_limit: smallest and largest `dt`, applied last.

    Returns:
        The state after the position, in the dtype of the sums, and `y` in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    v = _arrays(x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=state)
    _check_arrays("B", **v)
    _check_options(dt_limit)
    dtype = _accumulator(*v.values())
    now, x_, B_, C_ = (v[name].astype(dtype) for name in ("initial_state", "x", "B", "C"))
    step_size = _step_size(v["dt"].astype(dtype), v["dt_bias"], dt_softplus, dt_limit)
    now, y = step(now, x_, step_size, step_size * v["A"].astype(dtype), B_, C_)
    return now, _skip(y, x_, v["D"]).astype(v["x"].dtype)


def _arrays(**arrays: Any) -> dict[str, Any]:
    """Makes arrays of JAX of those that are given."""
    return {name: None if v is None else jnp.asarray(v) for name, v in arrays.items()}


def _accumulator(*arrays):
    wide = any(v is not None and v.dtype == jnp.float64 for v in arrays)
    return jnp.float64 if wide else jnp.float32


def _step_size(dt, bias, softplus, limit):
    if bias is not None:
        dt = dt + bias.astype(dt.dtype)
    if softplus:
        dt = jax.nn.softplus(dt)
    return dt if tuple(limit) == (0.0, float("inf")) else jnp.clip(dt, *limit)


def _skip(y, x, D):
    if D is None:
        return y
    D = D.astype(y.dtype)
    return y + (D if D.ndim == 2 else D[:, None]) * x


def _check_options(dt_limit, chunk_size=None, precision="tf32x3"):
    if not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (smallest, largest), got {dt_limit}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if precision not in ("tf32x3", "ieee", "tf32"):
        raise ValueError(f"precision must be 'tf32x3', 'ieee' or 'tf32', got {precision!r}")


def _check_arrays(axes, x, dt, A, B, C, D, dt_bias, initial_state, segment_ids=None):
    """Raises ValueError unless all fit `x [*axes,H,P]` and `B [*axes,G,N]`."""
    rank = len(axes) + 2
    if x.ndim != rank or 0 in x.shape:
        raise ValueError(f"x must be [{','.join(axes)},H,P] and not empty, got shape {x.shape}")
    *lead, heads, width = x.shape
    if B.ndim != rank or 0 in B.shape or heads % B.shape[-2]:
        raise ValueError(
            f"B must be [{','.join(axes)},G,N] with G dividing H = {heads}, got shape {B.shape}"
        )
    groups, size = B.shape[-2:]
    for name, array, *shapes in (
        ("x", x, x.shape),
        ("dt", dt, (*lead, heads)),
        ("A", A, (heads,)),
        ("B", B, (*lead, groups, size)),
        ("C", C, (*lead, groups, size)),
        ("D", D, (heads,), (heads, width)),
        ("dt_bias", dt_bias, (heads,)),
        ("the state", initial_state, (lead[0], heads, width, size)),
        ("segment_ids", segment_ids, tuple(lead)),
    ):
        if array is None:
            continue
        if array.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {wanted}, got {array.shape}")
        kind = jnp.integer if name == "segment_ids" else jnp.floating
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name} must hold {kind.__name__} numbers, got {array.dtype}")
