"""Every implementation of the op against the float64 recurrence and the published code."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests.ssd.cases import (
    ANYWHERE,
    GROUPS,
    KERNELS,
    LENGTHS,
    ONE_CHUNK,
    PARAMETERS,
    QUICK,
    RUNS,
    TOLERANCE,
    Case,
    assert_close,
    assert_same,
    exact,
    make,
    optimised,
    outcome,
    quick,
    to_dtype,
)
from tim4rec_jax.ssd import ssd, xla

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("op_ssd_*.npz"))
# In sizes that every implementation has.
SMALL = Case("small", 21, heads=4, groups=2, width=16, size=16, chunk_size=16, segments=True)

kernels = pytest.mark.parametrize("implementation", KERNELS)


@pytest.mark.parametrize(
    ("implementation", "case", "dtype"), RUNS, ids=lambda v: getattr(v, "name", v)
)
def test_equals_the_float64_recurrence(implementation, case, dtype, x64):
    # Triton's interpreter takes its time for each row.
    inputs, weights, options = make(case, batch=1 if implementation == "triton" else 2)
    inputs, weights = to_dtype((inputs, weights), dtype)
    run = optimised if implementation == "xla" and case in LENGTHS else quick
    got = run(inputs, weights, **options, implementation=implementation)
    assert got["y"].dtype == dtype
    assert got["final_state"].dtype == ("float64" if dtype == "float64" else "float32")
    assert_close(got, exact(inputs, weights, **options), TOLERANCE[dtype])


def golden_outcome(run, golden):
    """What `run` (`exact`, or `outcome` of an implementation) says, in terms of a golden file."""
    v = {name.removeprefix("in/"): golden[name] for name in golden if name.startswith("in/")}
    v = {name: value.astype(np.float64) for name, value in v.items()}  # stored in float32
    z, wy, wstate, A_log = v.pop("z", None), v.pop("wy"), v.pop("ws"), v.pop("A_log")
    A = v["A"] = -np.exp(A_log)
    if "initial_states" in v:
        v["initial_state"] = v.pop("initial_states")
    # The published layer multiplies y by silu(z), which is a weight of y in the objective.
    sigmoid = 1 if z is None else 1 / (1 + np.exp(-z))
    gate = 1 if z is None else z * sigmoid
    got = run(v, [wy * gate, wstate])
    y, state = (np.asarray(got.pop(name)) for name in ("y", "final_state"))
    got["A_log"] = got.pop("A") * A
    if z is not None:
        got["z"] = wy * y * sigmoid * (1 + z * (1 - sigmoid))
    if "initial_state" in got:
        got["initial_states"] = got.pop("initial_state")
    objective = np.sum(y * gate * wy) + np.sum(state * wstate)
    outputs = {"out/obj": objective, "out/y": y * gate, "out/final_state": state}
    return outputs | {f"grad/{name}": value for name, value in got.items()}


# The oracle is what every implementation is compared with, so it is compared with the published
# code in every test run, and implementations only with one file.
@pytest.mark.parametrize(
    ("path", "implementation", "dtype"),
    [
        *((path, "oracle", "float64") for path in GOLDEN),
        *((path, "xla", "float64") for path in GOLDEN if path.stem == "op_ssd_g2_L37_c16_z"),
        *(
            pytest.param(path, *way, marks=pytest.mark.slow)
            for path in GOLDEN
            for way in (("xla", "float64"), ("xla", "float32"), ("reference", "float64"))
        ),
    ],
    ids=lambda v: getattr(v, "stem", v),
)
def test_equals_the_published_code(path, implementation, dtype, x64):
    with np.load(path) as file:
        golden = dict(file)
    assert tuple(golden["dt_limit"]) == (0, np.inf)
    chunk_size = int(golden["chunk_size"])

    def run(inputs, weights):
        if implementation == "oracle":
            return exact(inputs, weights, dt_softplus=True)
        options = {"chunk_size": chunk_size, "implementation": implementation}
        return quick(*to_dtype((inputs, weights), dtype), dt_softplus=True, **options)

    wanted = {k: v for k, v in golden.items() if k.startswith(("out/", "grad/"))}
    assert_close(golden_outcome(run, golden), wanted, TOLERANCE[dtype])


def numpy_recurrence(x, dt, A, B, C, D, initial_state, segment_ids):
    """Section 5 of the design, once more and as plainly as can be: one head, one sequence."""
    state, ys = initial_state, []
    for t in range(len(x)):
        if t and segment_ids[t] != segment_ids[t - 1]:
            state = np.zeros_like(state)
        state = np.exp(dt[t] * A) * state + dt[t] * np.outer(x[t], B[t])
        ys.append(state @ C[t] + D * x[t])
    return np.array(ys), state


LENGTH, SOME = 13, st.floats(-2, 2, width=32)
run_float64 = {
    name: jax.jit(
        lambda implementation=name, **inputs: ssd(
            **inputs, return_final_state=True, chunk_size=4, implementation=implementation
        )
    )
    for name in ANYWHERE
}


@settings(max_examples=50)
@given(
    x=arrays(np.float64, (LENGTH, 2), elements=SOME),
    dt=arrays(np.float64, LENGTH, elements=st.sampled_from([0, 1e-6, 0.1, 1, 30, 80, 1e4])),
    segment_ids=arrays(np.int32, LENGTH, elements=st.integers(0, 2)),
    initial_state=arrays(np.float64, (2, 3), elements=SOME),
)
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_any_steps_and_segments(implementation, x, dt, segment_ids, initial_state):
    B, C = np.random.default_rng(0).normal(size=(2, LENGTH, 3))
    wanted = numpy_recurrence(x, dt, -1.0, B, C, 0.5, initial_state, segment_ids)
    with jax.enable_x64(True):
        got = run_float64[implementation](
            x=jax.device_put(x[None, :, None]),
            dt=jax.device_put(dt[None, :, None]),
            A=jnp.array([-1.0]),
            B=jax.device_put(B[None, :, None]),
            C=jax.device_put(C[None, :, None]),
            D=jnp.array([0.5]),
            initial_state=jax.device_put(initial_state[None, None]),
            segment_ids=jax.device_put(segment_ids[None]),
        )
    for result, value in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.squeeze(result), value, rtol=1e-9, atol=1e-9)


def small(implementation):
    """Returns what `make` does, one shape for all tests below: they share one program.

    Triton's interpreter has one row, as it takes its time for each.
    """
    inputs, weights, options = make(SMALL, batch=1 if implementation == "triton" else 8)
    options |= {"implementation": implementation}
    return *to_dtype((inputs, weights), "float32"), options


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_extreme_steps_leave_finite_gradients(implementation):
    inputs, weights, options = small(implementation)
    for step in (0.0, 80.0, 1e4):
        dt = np.array(inputs["dt"])
        dt[:, 1::3] = step
        got = quick(inputs | {"dt": jax.device_put(dt)}, weights, **options)
        assert all(np.isfinite(value).all() for value in got.values()), step


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_what_is_not_a_number_changes_nothing_before_it_and_in_other_segments(implementation):
    inputs, weights, options = small(implementation)
    ids, own = np.repeat([5, 2, 5], [4, 9, 8]), slice(4, 13)
    options["segment_ids"] = jnp.asarray(np.tile(ids, (len(inputs["x"]), 1)))
    weights = [np.zeros_like(w) for w in weights]
    weights[0][:, own] = np.random.default_rng(1).normal(size=weights[0][:, own].shape)
    wanted = quick(inputs, weights, **options)
    spoilt = inputs | {name: np.array(inputs[name]) for name in ("x", "dt", "B", "C")}
    spoilt["initial_state"] = np.full_like(inputs["initial_state"], np.inf)
    spoilt["x"][:, 13:], spoilt["B"][:, 14:] = np.nan, np.inf
    spoilt["dt"][:, 1:4], spoilt["C"][:, 13:] = np.nan, -np.inf
    got = quick(spoilt, weights, **options)
    y, state = got.pop("y"), got.pop("final_state")
    assert np.isnan(np.delete(y, np.r_[own], axis=1)).all() and np.isnan(state).all()
    del wanted["final_state"]
    assert_same(got | {"y": y[:, own]}, wanted | {"y": wanted["y"][:, own]})


def test_minus_infinity_is_a_step_of_zero(x64):
    inputs, weights, options = make(ONE_CHUNK)
    inputs["dt"][:, 3] = -np.inf
    got = quick(*to_dtype((inputs, weights), "float64"), **options, implementation="xla")
    assert_close(got, exact(inputs, weights, **options), TOLERANCE["float64"])


def test_forward_mode_is_the_transpose_of_the_gradient(x64):
    """<w, J t> = <J^T w, t>, with the gradient of the oracle on the right."""
    inputs, weights, options = make(GROUPS)
    changes = jax.tree.map(lambda v: np.random.default_rng(2).normal(size=v.shape), inputs)

    def change(inputs, changes):
        def op(inputs):
            return ssd(**inputs, **options, return_final_state=True, implementation="xla")

        return jax.jvp(op, (inputs,), (changes,))[1]

    got = jax.jit(change, compiler_options=QUICK)(*to_dtype((inputs, changes), "float64"))
    gradients = exact(inputs, weights, **options)
    wanted = sum(np.sum(gradients[name] * changes[name]) for name in inputs)
    total = sum(np.sum(w * v) for w, v in zip(weights, got, strict=True))
    np.testing.assert_allclose(total, wanted, rtol=1e-9)


@kernels
@pytest.mark.parametrize("shared", [False, True])
def test_under_vmap_and_remat_and_in_blocks(shared, implementation, monkeypatch):
    """Parameters of their own for each mapped row take another way than shared ones."""
    inputs, weights, options = small(implementation)
    mapped = {name for name in inputs if name not in PARAMETERS or not shared}
    both = [inputs, inputs | {name: inputs[name] - 0.5 for name in mapped}]
    wanted = [quick(inputs, weights, **options) for inputs in both]
    monkeypatch.setattr(xla, "_BLOCK", 1000)  # read while a program is traced
    stacked = inputs | {name: np.stack([one[name] for one in both]) for name in mapped}
    axes = {name: 0 if name in mapped else None for name in inputs}
    run = jax.vmap(lambda v: outcome(v, weights, remat=True, **options), in_axes=(axes,))
    got = jax.jit(run, compiler_options=QUICK)(stacked)
    for row, alone in enumerate(wanted):
        assert_same(jax.tree.map(lambda v, row=row: v[row], got), alone)


@pytest.mark.parametrize("implementation", [name for name in KERNELS if name != "triton"])
def test_sharded_over_eight_devices(implementation):
    """A callback cannot be sharded: test_triton.py has a test of its own."""
    inputs, weights, options = small(implementation)
    wanted = quick(inputs, weights, **options)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("batch",), ())
    )
    inputs = {
        name: jax.device_put(value, whole if name in PARAMETERS else rows)
        for name, value in inputs.items()
    }
    got = quick(inputs, jax.device_put(weights, rows), **options)
    assert got["y"].sharding.is_equivalent_to(rows, 4)
    assert_same(got, wanted)


@pytest.mark.parametrize("implementation", ["xla"])  # an interpreter's memory says nothing
def test_memory_is_linear_in_the_length(implementation):
    def temporaries(length):
        inputs, weights, options = make(Case("long", length, initial_state=False))
        run = jax.jit(lambda i, w: outcome(i, w, **options, implementation=implementation))
        program = run.lower(*to_dtype((inputs, weights), "float32")).compile(QUICK)
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 5 * temporaries(512)
