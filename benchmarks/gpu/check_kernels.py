"""The kernels at the shapes that are trained: their errors, their bits again, large offsets.

The errors are those against the float64 recurrence, relative to the norm of each array. Results of
the same inputs must have the same bits in every run: an error that moves is a race.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.common import Session
from tim4rec_jax.ssd import finite_inputs, ssd, time_aware_ssd_block
from tim4rec_jax.ssd.shapes import BEAUTY, ML_1M, ML_1M_256, in_bfloat16, random_inputs

LIMITS = {"float32": 1e-5, "ieee": 1e-5, "tf32": 3e-3, "bfloat16": 1e-2}
ROWS, MANY_ROWS = 64, 2048


def op(inputs, *, softplus=True, **options):
    """The op's results."""
    return ssd(**inputs, dt_softplus=softplus, return_final_state=True, **options)


def block(inputs, **options):
    """The block's result, as a tuple of one."""
    return (time_aware_ssd_block(**inputs, activation="hardswish", state=32, **options),)


def outcome(function, inputs):
    """Returns the results of a function, and the gradients of a weighted sum of them."""

    def objective(inputs):
        results = function(inputs)
        kinds = [jnp.promote_types(r.dtype, jnp.float32) for r in results]
        weighted = [
            jnp.sum(r.astype(kind) * jnp.cos(jnp.arange(r.size, dtype=kind)).reshape(r.shape))
            for r, kind in zip(results, kinds, strict=True)
        ]
        return sum(weighted), results

    gradients, results = jax.grad(objective, has_aux=True)(inputs)
    named = {f"out{i}": result for i, result in enumerate(results)}
    return named | {f"d{name}": v for name, v in gradients.items()}


def compare(session, name, function, inputs, kind, **options):
    """Writes the errors of the kernel for one case."""

    def errors():
        start = time.time()
        precision = {"precision": kind} if kind in ("ieee", "tf32") else {}

        def run(inputs, implementation, **more):
            return outcome(
                lambda v: function(v, **options, **more, implementation=implementation), inputs
            )

        got = jax.jit(lambda v: run(v, session.kernel, **precision))(inputs)
        wide = jax.tree.map(lambda v: v.astype(jnp.float64), inputs)
        wanted = jax.jit(lambda v: run(v, "reference"))(wide)
        found = {}
        for key, value in wanted.items():
            value, result = (np.asarray(v).astype(np.float64) for v in (value, got[key]))
            error = np.linalg.norm(result - value) / max(np.linalg.norm(value), 1e-30)
            found[key] = float(error)
        worst = max(found.values())
        ok = bool(worst < LIMITS[kind])  # False for NaN
        return {"worst": worst, "ok": ok, "errors": found, "seconds": round(time.time() - start, 1)}

    session.attempt(errors, case=name, kind=kind)


# What is trained in float32, and all else.
RELEASED_OP = [(BEAUTY, "float32"), (ML_1M, "float32"), (ML_1M_256, "float32")]
RELEASED_BLOCK = [(BEAUTY, "float32"), (BEAUTY._replace(length=200), "float32")]
OTHER_OP = [(in_bfloat16(s), "bfloat16") for s in (BEAUTY, ML_1M, ML_1M_256)]
OTHER_OP += [(s, kind) for kind in ("ieee", "tf32") for s in (BEAUTY, ML_1M)]
OTHER_BLOCK = [(in_bfloat16(s), "bfloat16") for s in (BEAUTY, ML_1M)]
OTHER_BLOCK += [(BEAUTY._replace(length=n), "float32") for n in (4, 28)]


def check_errors(session, op_cases, block_cases):
    """Cases against the recurrence: shapes and kinds, the keys of `LIMITS`."""
    rng = np.random.default_rng(0)

    def segments(shape):
        restarts = rng.random((shape.batch, shape.length)) < 0.03
        return jnp.asarray(np.cumsum(restarts, axis=1), jnp.int32)

    for shape, kind in op_cases:
        shape = session.sized(shape, ROWS)
        inputs = random_inputs(shape.op_inputs(), 1)
        compare(session, f"op L{shape.length} P{shape.width}", op, inputs, kind)
        if kind == "float32" and shape.width == 32:  # as the causal model calls it
            few = {k: v for k, v in inputs.items() if k not in ("D", "dt_bias")}
            few["dt"] = jnp.abs(few["dt"])
            options = {"softplus": False, "segment_ids": segments(shape)}
            compare(session, f"op, segments, no D, L{shape.length}", op, few, kind, **options)
    for shape, kind in block_cases:
        shape = session.sized(shape, ROWS)
        inputs = random_inputs(shape.block_inputs(), 1)
        compare(session, f"block L{shape.length}", block, inputs, kind)
        if shape.length > 28 and kind == "float32":
            ids = segments(shape)
            name = f"block, segments, L{shape.length}"
            compare(session, name, block, inputs, kind, segment_ids=ids)
            name = f"block of the causal layer, segments, L{shape.length}"
            inputs = random_inputs(shape.block_inputs(causal=True), 1)
            compare(session, name, block, inputs, kind, segment_ids=ids)


def bits(v):
    """The bits of floating-point numbers, as integers."""
    return jax.lax.bitcast_convert_type(v, f"uint{8 * v.dtype.itemsize}")


def check_bits(session):
    """Whether ten runs leave the same bits."""
    for shape in (BEAUTY, ML_1M, in_bfloat16(ML_1M)):
        shape = session.sized(shape, MANY_ROWS)

        def differing(shape=shape):
            inputs = [random_inputs(f(), 2) for f in (shape.op_inputs, shape.block_inputs)]

            @jax.jit
            def run(inputs):
                return [
                    outcome(lambda v, f=f: f(v, implementation=session.kernel), one)
                    for f, one in zip((op, block), inputs, strict=True)
                ]

            @jax.jit
            def differ(first, again):
                pairs = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
                return jnp.any(jnp.stack([jnp.any(bits(a) != bits(b)) for a, b in pairs]))

            first = run(inputs)
            finite = all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(first))
            times = 2 if session.rehearse else 10
            count = sum(bool(differ(first, run(inputs))) for _ in range(times))
            return {"runs_that_differ": count, "ok": count == 0 and finite}

        session.attempt(differing, case=f"same bits, L{shape.length}", kind=shape.dtype)


def check_offsets(session):
    """Arrays of more than 2**31 numbers: rows repeat in them, and so must results."""

    def repeat(inputs, names, times):
        return {
            k: jnp.tile(v, (times,) + (1,) * (v.ndim - 1)) if k in names else v
            for k, v in inputs.items()
        }

    shape = session.sized(in_bfloat16(ML_1M), 64)
    rows, op_times, block_times = shape.batch, *((2, 2) if session.rehearse else (1500, 600))

    def same(v):
        finite = bool(jnp.isfinite(v[-1].astype(jnp.float32)).all())
        equal = bool(jnp.array_equal(v[:rows], v[-rows:]))
        return {"elements": v.size, "ok": equal and finite}

    def op_gradient():
        stats = jax.devices()[0].memory_stats() or {}  # None on a CPU
        if (has := stats.get("bytes_limit", 0)) < 64e9 and not session.rehearse:
            return {"skipped": f"needs 64 GB, and JAX has {has / 1e9:.0f}"}
        inputs = random_inputs(shape.op_inputs(), 3)
        inputs = repeat(inputs, ("x", "B", "C", "dt"), op_times)

        def total(x, others):
            y = ssd(x, **others, dt_softplus=True, implementation=session.kernel)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        x = inputs.pop("x")
        with finite_inputs():  # no copies to look for NaN in
            return same(jax.jit(jax.grad(total))(x, inputs))

    def block_gradient():
        inputs = random_inputs(shape.block_inputs(), 3)
        inputs = repeat(inputs, ("projected", "time_factor"), block_times)

        def total(inputs):
            (y,) = block(inputs, implementation=session.kernel)
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return same(jax.jit(jax.grad(total))(inputs)["projected"])

    session.attempt(op_gradient, case="large offsets, gradient of the op")
    session.attempt(block_gradient, case="large offsets, gradient of the block")


def main() -> None:
    """Runs the command line."""
    session = Session("check_kernels", __doc__)
    with jax.enable_x64(True):
        check_errors(session, RELEASED_OP, RELEASED_BLOCK)
        check_bits(session)
        check_offsets(session)
        check_errors(session, OTHER_OP, OTHER_BLOCK)
    session.finish()


if __name__ == "__main__":
    main()
