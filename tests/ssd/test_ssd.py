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
    KERNELS,
    LENGTHS,
    QUICK,
    REORDERED,
    RUNS,
    TOLERANCE,
    Case,
    assert_close,
    exact,
    make,
    optimised,
    outcome,
    quick,
    to_dtype,
)
from tim4rec_jax.ssd import ssd, xla

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("op_ssd_*.npz"))
SMALL = Case("small", 21, heads=4, groups=2, chunk_size=8, segments=True)

kernels = pytest.mark.parametrize("implementation", KERNELS)


@pytest.mark.parametrize(
    ("implementation", "case", "dtype"), RUNS, ids=lambda v: getattr(v, "name", v)
)
def test_equals_the_float64_recurrence(implementation, case, dtype, x64):
    inputs, weights, options = make(case)
    inputs, weights = to_dtype((inputs, weights), dtype)
    run = optimised if implementation == "xla" and case in LENGTHS else quick
    got = run(inputs, weights, **options, implementation=implementation)
    wanted = exact(inputs, weights, **options)
    assert got["y"].dtype == dtype
    assert got["final_state"].dtype == ("float64" if dtype == "float64" else "float32")
    assert_close(got, wanted, TOLERANCE[dtype])


def golden_outcome(inputs, implementation, chunk_size):
    """`outcome` in the terms of the golden files."""

    def objective(inputs):
        y, state = ssd(
            inputs["x"],
            inputs["dt"],
            -jnp.exp(inputs["A_log"]),
            inputs["B"],
            inputs["C"],
            inputs.get("D"),
            dt_bias=inputs["dt_bias"],
            dt_softplus=True,
            initial_state=inputs.get("initial_states"),
            return_final_state=True,
            chunk_size=chunk_size,
            implementation=implementation,
        )
        if "z" in inputs:
            y = y * jax.nn.silu(inputs["z"])
        return jnp.sum(y * inputs["wy"]) + jnp.sum(state * inputs["ws"]), (y, state)

    (value, (y, state)), gradients = jax.value_and_grad(objective, has_aux=True)(inputs)
    outputs = {"out/obj": value, "out/y": y, "out/final_state": state}
    return outputs | {f"grad/{name}": v for name, v in gradients.items() if name not in "wy ws"}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("xla", "float64"),
        # The recurrence is what all implementations are compared with in float64.
        pytest.param("reference", "float64", marks=pytest.mark.slow),
        pytest.param("xla", "float32", marks=pytest.mark.slow),
    ],
)
def test_equals_the_published_code(path, implementation, dtype, x64):
    with np.load(path) as file:
        golden = dict(file)
    assert tuple(golden["dt_limit"]) == (0, np.inf)
    inputs = {k.removeprefix("in/"): v for k, v in golden.items() if k.startswith("in/")}
    run = jax.jit(golden_outcome, static_argnums=(1, 2), compiler_options=QUICK)
    got = run(to_dtype(inputs, dtype), implementation, int(golden["chunk_size"]))
    wanted = {k: v for k, v in golden.items() if k.startswith(("out/", "grad/"))}
    assert_close(got, wanted, TOLERANCE[dtype])


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
            x=jnp.asarray(x[None, :, None]),
            dt=jnp.asarray(dt[None, :, None]),
            A=jnp.array([-1.0]),
            B=jnp.asarray(B[None, :, None]),
            C=jnp.asarray(C[None, :, None]),
            D=jnp.array([0.5]),
            initial_state=jnp.asarray(initial_state[None, None]),
            segment_ids=jnp.asarray(segment_ids[None]),
        )
    for result, value in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.squeeze(result), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
def test_extreme_steps_leave_finite_gradients(implementation):
    inputs, weights, options = make(SMALL)
    for step in (0.0, 80.0, 1e4):
        inputs["dt"][:, 1::3] = step
        arguments = to_dtype((inputs, weights), "float32")
        got = quick(*arguments, **options, implementation=implementation)
        assert all(np.isfinite(value).all() for value in got.values()), step


@kernels
def test_under_vmap(implementation):
    stacked = [make(SMALL), make(SMALL)]
    stacked[1][0]["x"] += 1
    inputs, weights = (
        to_dtype(jax.tree.map(lambda *v: np.stack(v), *(s[i] for s in stacked)), "float32")
        for i in (0, 1)
    )
    options = stacked[0][2] | {"implementation": implementation}
    got = jax.jit(jax.vmap(lambda i, w: outcome(i, w, **options)), compiler_options=QUICK)(
        inputs, weights
    )
    for row in range(2):
        pick = jax.tree.map(lambda v, row=row: v[row], (inputs, weights))
        assert_close(
            jax.tree.map(lambda v, row=row: v[row], got), quick(*pick, **options), REORDERED
        )


@kernels
def test_under_remat_and_in_blocks(implementation, monkeypatch):
    inputs, weights, options = make(SMALL)
    inputs, weights = to_dtype((inputs, weights), "float32")
    options["implementation"] = implementation
    wanted = quick(inputs, weights, **options)
    monkeypatch.setattr(xla, "_BLOCK", 1000)

    @jax.checkpoint
    def y_and_state(inputs):
        return ssd(**inputs, return_final_state=True, **options)

    def objective(inputs):
        results = y_and_state(inputs)
        return sum(jnp.sum(r * w) for r, w in zip(results, weights, strict=True))

    got = jax.jit(jax.grad(objective), compiler_options=QUICK)(inputs)
    assert_close(got, {name: wanted[name] for name in got}, REORDERED)


@kernels
def test_sharded_over_eight_devices(implementation):
    inputs, weights, options = make(SMALL, batch=8)
    inputs, weights = to_dtype((inputs, weights), "float32")
    options["implementation"] = implementation
    wanted = quick(inputs, weights, **options)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("batch",), ())
    )
    parameters = {"A", "D", "dt_bias"}
    inputs = {
        name: jax.device_put(value, whole if name in parameters else rows)
        for name, value in inputs.items()
    }
    got = quick(inputs, jax.device_put(weights, rows), **options)
    assert got["y"].sharding.is_equivalent_to(rows, 4)
    assert_close(got, wanted, REORDERED)


@pytest.mark.parametrize("implementation", ["xla"])  # an interpreter's memory says nothing
def test_memory_is_linear_in_the_length(implementation):
    def temporaries(length):
        inputs, weights, options = make(Case("long", length, initial_state=False))
        run = jax.jit(lambda i, w: outcome(i, w, **options, implementation=implementation))
        program = run.lower(*to_dtype((inputs, weights), "float32")).compile(QUICK)
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 5 * temporaries(512)
