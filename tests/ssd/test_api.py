"""What holds between calls of the op, and what it says of wrong ones."""

import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ssd.cases import ANYWHERE, QUICK, Case, make, to_dtype
from tim4rec_jax.runtime import target
from tim4rec_jax.ssd import compile_for, ssd, ssd_step
from tim4rec_jax.ssd.dispatch import Implementation, choose

CASE = Case("", 19, heads=4, groups=2, chunk_size=8, skip_per_channel=True, dt_limit=(0.1, 1.5))
PER_POSITION = ("x", "dt", "B", "C")

STATIC = ("dt_softplus", "dt_limit", "return_final_state", "chunk_size", "implementation")
run = jax.jit(ssd, static_argnames=STATIC, compiler_options=QUICK)
run_step = jax.jit(ssd_step, static_argnames=("dt_softplus", "dt_limit"), compiler_options=QUICK)

implementations = pytest.mark.parametrize("implementation", ANYWHERE)


@pytest.fixture
def arguments(x64):
    inputs, _, options = make(CASE)
    return to_dtype(inputs, "float64") | options


def piece(arguments, positions):
    """The arguments with some positions only."""
    return arguments | {name: arguments[name][:, positions] for name in PER_POSITION}


def test_steps_equal_the_sequence(arguments):
    wanted = run(**arguments, return_final_state=True)
    del arguments["chunk_size"]
    state, ys = arguments.pop("initial_state"), []
    for t in range(CASE.length):
        state, y = run_step(state, **piece(arguments, t))
        ys.append(y)
    np.testing.assert_allclose(jnp.stack(ys, axis=1), wanted[0], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(state, wanted[1], rtol=1e-11, atol=1e-13)


def test_step_keeps_its_state_in_float32():
    inputs, _, _ = make(Case("", 1))
    inputs = to_dtype(inputs, "bfloat16")
    arguments = inputs | {name: inputs[name][:, 0] for name in PER_POSITION}
    state, y = run_step(arguments.pop("initial_state"), **arguments, dt_softplus=True)
    assert (state.dtype, y.dtype) == ("float32", "bfloat16")


@implementations
@pytest.mark.parametrize("cut", [1, 8, 11])
def test_a_sequence_continues_from_its_state(arguments, implementation, cut):
    arguments |= {"implementation": implementation, "return_final_state": True}
    wanted, final = run(**arguments)
    first, state = run(**piece(arguments, slice(cut)))
    second, state = run(**piece(arguments, slice(cut, None)) | {"initial_state": state})
    joined = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(joined, wanted, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(state, final, rtol=1e-11, atol=1e-13)


@implementations
def test_segments_equal_sequences_run_apart(arguments, implementation):
    arguments["implementation"] = implementation
    bounds = (0, 5, 8, 16, 19)
    ids = np.repeat([7, 3, 7, 0], np.diff(bounds))  # an id may come back: it is another segment
    ids = jnp.tile(ids, (2, 1))
    whole, final = run(**arguments, segment_ids=ids, return_final_state=True)
    for start, end in itertools.pairwise(bounds):
        apart = piece(arguments, slice(start, end))
        if start:
            del apart["initial_state"]
        y, state = run(**apart, return_final_state=True)
        np.testing.assert_allclose(whole[:, start:end], y, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(final, state, rtol=1e-11, atol=1e-13)


def test_numpy_arrays_with_segments():
    inputs, _, _ = make(CASE)
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    ids = np.zeros((2, CASE.length), int)
    op = functools.partial(ssd, **inputs, segment_ids=ids, dt_softplus=True)
    assert jax.eval_shape(op).shape == inputs["x"].shape
    state = inputs.pop("initial_state")
    _, y = jax.eval_shape(functools.partial(ssd_step, state, **piece(inputs, 0)))
    assert y.shape == inputs["x"][:, 0].shape


def test_symbolic_batch_and_length():
    """Exported once, called with a length of two chunks and a ragged one."""
    inputs, _, _ = make(Case("", 70, initial_state=False, segments=True))
    inputs = {name: value.astype(np.float32) for name, value in inputs.items()}
    ids = np.repeat([[0, 1, 0]], [3, 60, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    rows, length = jax.export.symbolic_shape("rows, length")

    def op(inputs, ids):
        return ssd(**inputs, segment_ids=ids, dt_softplus=True, return_final_state=True)

    def spec(name, v):
        lead = (rows, length) if name in (*PER_POSITION, "ids") else v.shape[:2]
        return jax.ShapeDtypeStruct((*lead, *v.shape[2:]), v.dtype)

    specs = {name: spec(name, v) for name, v in inputs.items()}
    program = jax.export.export(jax.jit(op))(specs, spec("ids", ids))
    got = jax.jit(program.call, compiler_options=QUICK)(inputs, ids)
    for a, b in zip(got, jax.jit(op, compiler_options=QUICK)(inputs, ids), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    kernel = jax.jit(lambda inputs: ssd(**inputs, implementation="tpu"))
    with compile_for("tpu"), pytest.raises(ValueError, match="made for one shape, and this one is"):
        jax.export.export(kernel)(specs)


def test_the_default_is_an_implementation_by_name(arguments):
    assert any(
        bool(jnp.all(run(**arguments) == run(**arguments, implementation=name)))
        for name in ANYWHERE
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of reference, xla"),
        ({"precision": "high"}, "precision must be 'tf32x3', 'ieee' or 'tf32', got 'high'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit must be \(smallest, largest\)"),
        (
            {"x": jnp.ones((2, 19, 4))},
            r"x must be \[B,L,H,P\] and not empty, got shape \(2, 19, 4\)",
        ),
        ({"x": jnp.ones((2, 0, 4, 5))}, "x must be .* not empty"),
        ({"x": jnp.ones((2, 19, 4, 5), int)}, "x must hold floating numbers, got int"),
        ({"B": jnp.ones((2, 19, 3, 3))}, "B must be .* with G dividing H = 4"),
        ({"C": jnp.ones((2, 19, 1, 3))}, r"C must have shape \(2, 19, 2, 3\), got \(2, 19, 1, 3\)"),
        ({"dt": jnp.ones((2, 18, 4))}, r"dt must have shape \(2, 19, 4\)"),
        ({"A": jnp.ones((4, 1))}, r"A must have shape \(4,\)"),
        ({"D": jnp.ones(5)}, r"D must have shape \(4,\) or \(4, 5\), got \(5,\)"),
        ({"initial_state": jnp.ones((2, 4, 3, 5))}, r"the state must have shape \(2, 4, 5, 3\)"),
        ({"segment_ids": jnp.ones((2, 19))}, "segment_ids must hold integer numbers, got float"),
    ],
)
def test_says_what_is_wrong(arguments, change, message, no_shape_checks):
    with pytest.raises(ValueError, match=message):
        ssd(**arguments | change)


def test_step_says_what_is_wrong(arguments, no_shape_checks):
    del arguments["chunk_size"]
    state = arguments.pop("initial_state")
    with pytest.raises(ValueError, match=r"x must be \[B,H,P\] and not empty"):
        ssd_step(state, **arguments)
    with pytest.raises(ValueError, match=r"the state must have shape \(2, 4, 5, 3\)"):
        ssd_step(state[:1], **piece(arguments, 0))


def test_the_best_that_can_run_is_chosen():
    table = {
        "xla": Implementation(abs),
        "fast": Implementation(min, "gpu", lambda v: "v is 0" if v == 0 else None),
    }
    assert choose(table, None, 1) is table["xla"]
    with pytest.raises(ValueError, match="'fast' runs on the platform 'gpu', and this is 'cpu'"):
        choose(table, "fast", 1)
    with compile_for("gpu", 90):
        assert target() == ("gpu", 90)
        assert choose(table, None, 1) is choose(table, "fast", 1) is table["fast"]
        assert choose(table, None, 0) is choose(table, "xla", 0) is table["xla"]
        with pytest.raises(ValueError, match="'fast' cannot run: v is 0"):
            choose(table, "fast", 0)
    assert target() == ("cpu", None)


def test_programs_are_traced_again_for_another_platform():
    platform = jax.jit(lambda: len(target().platform) * jnp.arange(target().compute_capability))
    with compile_for("gpu", 2):
        first = platform()
    with compile_for("tpu", 3):
        assert (first.size, platform().size) == (2, 3)
