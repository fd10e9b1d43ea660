"""The selective scan against the published reference function and against a plain loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ssd.cases import QUICK
from tim4rec_jax.layers.mamba import (
    selective_scan,
    selective_scan_last,
    selective_scan_step,
    skip_and_gate,
    step_size,
)

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}


def close(got, wanted, tolerance, what):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted)
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted), what


@pytest.mark.parametrize("name", ["L1", "L37", "L200_init"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_is_the_published_scan_with_its_gradients(golden_all, name, dtype):
    path = golden_all / "baselines" / f"op_selective_scan_{name}.npz"
    if not path.exists():
        pytest.skip("one of the large files: needs TIM4REC_GOLDEN")
    arrays = dict(np.load(path))

    def objective(inputs):
        lengthwise = {name: inputs[name].swapaxes(1, 2) for name in ("u", "delta", "B", "C", "z")}
        y, state = selective_scan(
            **lengthwise,
            A=-jnp.exp(inputs["A_log"]),
            D=inputs["D"],
            delta_bias=inputs["delta_bias"],
            delta_softplus=True,
        )
        return jnp.sum(y * arrays["in/wy"].swapaxes(1, 2)), (y.swapaxes(1, 2), state)

    with jax.enable_x64(dtype == "float64"):
        names = [key.removeprefix("grad/") for key in arrays if key.startswith("grad/")]
        inputs = {name: jnp.asarray(arrays[f"in/{name}"], dtype) for name in names}
        run = jax.jit(jax.value_and_grad(objective, has_aux=True), compiler_options=QUICK)
        (value, (y, state)), gradients = run(inputs)
    tolerance = TOLERANCE[dtype]
    close(y, arrays["out/y"], tolerance, "y")
    close(state, arrays["out/last_state"], tolerance, "state")
    # The file has float32 of the weights that the objective had in float64.
    tolerance = max(tolerance, 2e-7)
    close(value, arrays["out/obj"], tolerance, "objective")
    for name in names:
        close(gradients[name], arrays[f"grad/{name}"], tolerance, f"gradient of {name}")


BATCH, LENGTH, WIDTH, STATE = 2, 11, 3, 4


def example():
    rng = np.random.default_rng(1)
    normal = rng.standard_normal
    return {
        "u": normal((BATCH, LENGTH, WIDTH)),
        "delta": rng.uniform(0.1, 2, (BATCH, LENGTH, WIDTH)),
        "A": -rng.uniform(0.1, 2, (WIDTH, STATE)),
        "B": normal((BATCH, LENGTH, STATE)),
        "C": normal((BATCH, LENGTH, STATE)),
        "initial_state": normal((BATCH, WIDTH, STATE)),
    }


def loop(inputs, segment_ids=None):
    """The definition, a position at a time."""
    same = np.ones((BATCH, LENGTH), bool)
    if segment_ids is not None:
        same[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]

    def position(h, now):
        same, dt, u, B, C = now
        h = jnp.where(same[:, None, None], h, 0.0)
        h = jnp.exp(dt[..., None] * inputs["A"]) * h + (dt * u)[..., None] * B[:, None]
        return h, jnp.einsum("bdn,bn->bd", h, C)

    arrays = (jax.device_put(same), *(inputs[name] for name in ("delta", "u", "B", "C")))
    h, ys = jax.lax.scan(
        position, inputs["initial_state"], [array.swapaxes(0, 1) for array in arrays]
    )
    return ys.swapaxes(0, 1), h


@pytest.mark.parametrize("segments", [False, True])
def test_is_the_loop_with_its_gradients(x64, segments):
    inputs = jax.tree.map(jnp.asarray, example())
    ids = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3], [5] * 10 + [6]]) if segments else None
    weights = np.random.default_rng(2).standard_normal((BATCH, LENGTH, WIDTH))

    def objective(run, inputs):
        y, state = run(inputs)
        return jnp.sum(y * weights) + jnp.sum(state**2), (y, state)

    def ours(inputs):
        return selective_scan(**inputs, segment_ids=None if ids is None else jax.device_put(ids))

    results = [
        jax.jit(
            jax.value_and_grad(functools.partial(objective, run), has_aux=True),
            compiler_options=QUICK,
        )(inputs)
        for run in (ours, lambda inputs: loop(inputs, ids))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *results)


def test_last_position_and_steps(x64):
    inputs = jax.tree.map(jnp.asarray, example()) | {"initial_state": None}
    u, dt, A, B, C = (inputs[name] for name in ("u", "delta", "A", "B", "C"))
    lengths = jnp.array([11, 4])
    rows = jnp.arange(BATCH)

    def last(u, dt, A, B, C):
        return selective_scan_last(u, dt, A, B, C[rows, lengths - 1], lengths)

    def whole(u, dt, A, B, C):
        return selective_scan(u, dt, A, B, C)[0][rows, lengths - 1]

    def steps(u, dt, A, B, C):
        def step(state, now):
            u, dt, B, C = now
            return selective_scan_step(state, u, dt, A, B, C)

        by_position = [array.swapaxes(0, 1) for array in (u, dt, B, C)]
        return jax.lax.scan(step, jnp.zeros((BATCH, WIDTH, STATE)), by_position)[1].swapaxes(0, 1)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*arguments):
        def with_gradients(f):
            return jax.value_and_grad(
                lambda *args: (jnp.sum((y := f(*args)) ** 2), y), argnums=range(5), has_aux=True
            )(*arguments)

        ends = [with_gradients(f) for f in (last, whole)]
        return ends, steps(*arguments), selective_scan(**inputs)[0]

    (((_, at_end), gradients), ((_, expected), others)), stepped, y = run(u, dt, A, B, C)
    np.testing.assert_allclose(at_end, expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradients, others)
    np.testing.assert_allclose(stepped, y, rtol=1e-12)


def test_states_are_not_kept_for_every_position():
    shapes = {"u": (4, 100, 32), "delta": (4, 100, 32), "A": (32, 16)}
    inputs = {name: jnp.ones(shape) for name, shape in shapes.items()}
    inputs |= {name: jnp.ones((4, 100, 16)) for name in "BC"}
    gradient = jax.jit(jax.grad(lambda inputs: selective_scan(**inputs)[0].sum()))
    memory = gradient.lower(inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.6 * 4 * 100 * 32 * 16 * 4


def test_softplus_skip_and_gate_by_hand():
    delta, bias = jnp.array([[-1.0, 30.0]]), jnp.array([0.5, 0.0])
    expected = [[np.log1p(np.exp(-0.5)), 30.0]]
    np.testing.assert_allclose(step_size(delta, bias, True), expected, rtol=1e-6)
    np.testing.assert_array_equal(step_size(delta, None, False), delta)
    y, u, z = jnp.array([[2.0]]), jnp.array([[3.0]]), jnp.array([[1.0]])
    gate = 1 / (1 + np.exp(-1))
    results = [
        skip_and_gate(y, u, D, gates)[0, 0]
        for D, gates in itertools.product((None, jnp.array([0.5])), (None, z))
    ]
    np.testing.assert_allclose(results, [2, 2 * gate, 3.5, 3.5 * gate], rtol=1e-6)
