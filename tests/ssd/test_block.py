"""The block around the op, every implementation of it against NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ssd import oracle
from tests.ssd.cases import QUICK, TOLERANCE, assert_close, assert_same, to_dtype
from tim4rec_jax.ssd import compile_for, time_aware_ssd_block
from tim4rec_jax.ssd.fused_block import has_kernel
from tim4rec_jax.ssd.shapes import TRAINED
from tim4rec_jax.ssd.triton import launch as triton_launch

STATIC = ("activation", "state", "groups", "eps", "chunk_size", "implementation")


def make(length, *, batch=2, heads=2, groups=1, width=5, size=8, taps=4, **options):
    """Returns float64 inputs, weights of the result in an objective, and other arguments."""
    rng = np.random.default_rng(length)
    inner, mixed = heads * width, heads * width + 2 * groups * size
    inputs = {
        "projected": rng.normal(size=(batch, length, inner + mixed + heads)),
        "time_factor": rng.normal(size=(batch, length, heads)),
        "conv_kernel": rng.normal(size=(taps, mixed)),
        "conv_bias": rng.normal(size=mixed),
        "A": -rng.uniform(0.5, 2, heads),
        "D": rng.normal(size=heads),
        "dt_bias": rng.normal(size=heads),
        "norm_scale": rng.normal(size=inner),
    }
    if options.pop("segments", False):
        ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) % 3
        options["segment_ids"] = jax.device_put(ids)
    options = {"activation": "hardswish", "state": size, "groups": groups} | options
    if "time_factor" in options:
        del inputs["time_factor"]
    if options.pop("causal", False):
        del inputs["time_factor"]
        for name in ("time_step", "time_rate"):
            inputs[name] = rng.normal(size=(batch, length, heads))
    return inputs, rng.normal(size=(batch, length, inner)), options


def outcome(inputs, weights, **options):
    """Returns `y` and the gradient of its weighted sum for every input."""

    def objective(inputs):
        y = time_aware_ssd_block(**inputs, **options)
        return jnp.sum(y * weights), y

    gradients, y = jax.grad(objective, has_aux=True)(inputs)
    return {"y": y, **gradients}


run = jax.jit(outcome, static_argnames=STATIC, compiler_options=QUICK)


CASES = {
    "L2": {"length": 2, "activation": "silu"},
    "groups": {"length": 64, "heads": 4, "groups": 2, "segments": True},
    "chunks": {"length": 65, "chunk_size": 16, "segments": True, "taps": 3},
    "L257": {"length": 257},
}
FURTHER = {
    "L1": {"length": 1, "taps": 1},
    "no factor": {"length": 31, "chunk_size": 16, "time_factor": None},
    "L65": {"length": 65},
    "causal": {"length": 33, "causal": True, "chunk_size": 16, "segments": True},
    "causal in one chunk": {"length": 20, "causal": True},
}
RUNS = [
    *((name, *run) for name in ("xla", "tpu") for run in itertools.product(CASES, ["float32"])),
    *itertools.product(("xla", "tpu"), ("L2", "chunks"), ["bfloat16"]),
    *((name, "chunks", "float64") for name in ("xla", "reference")),
    ("xla", "causal", "float32"),
]
HEAVY = {
    *(("xla", "L257", "float32"), ("tpu", "L257", "float32"), ("xla", "groups", "float32")),
    # Chunks are passed over in float32 too, and bfloat16 changes the products alone.
    *(("xla", "L2", "bfloat16"), ("tpu", "chunks", "bfloat16")),
}


def heavy_ones_slow(runs, heavy):
    """Returns the runs, those in `heavy` marked as slow tests."""
    return [pytest.param(*r, marks=pytest.mark.slow) if r in heavy else r for r in runs]


@pytest.mark.parametrize(("implementation", "case", "dtype"), heavy_ones_slow(RUNS, HEAVY))
def test_equals_the_float64_recurrence(implementation, case, dtype, x64):
    check(implementation, dtype, **(CASES | FURTHER)[case])


TRITON_RUNS = [
    *((c, "float32") for c in CASES | FURTHER),
    # In one chunk products are tensor cores', in several they are not.
    *((c, "bfloat16") for c in ("groups", "chunks")),
]
TRITON_HEAVY = {("L257", "float32"), ("L65", "float32"), ("chunks", "bfloat16")}


@pytest.mark.parametrize(("case", "dtype"), heavy_ones_slow(TRITON_RUNS, TRITON_HEAVY))
def test_triton_equals_the_float64_recurrence(case, dtype, x64, triton):
    """The kernels' own sizes, in Triton's interpreter."""
    check("triton", dtype, **(CASES | FURTHER)[case], batch=1, width=16, size=32)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, "float32") for shape in TRAINED),
        *(pytest.param(s, "bfloat16", marks=pytest.mark.slow) for s in TRAINED),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_triton_as_trained(shape, dtype, x64, triton):
    """The heads and the state of the released models, in one chunk and in two."""
    sizes = {"heads": shape.heads, "width": shape.width, "size": shape.state, "batch": 1}
    check("triton", dtype, length=shape.length, chunk_size=32, **sizes)


def check(implementation, dtype, **case):
    inputs, weights, options = make(**case)
    inputs, weights = to_dtype((inputs, weights), dtype)
    got = run(inputs, weights, **options, implementation=implementation)
    assert got["y"].dtype == dtype
    assert_close(got, oracle.block(inputs, weights, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", ["xla", "tpu"])
def test_what_is_not_a_number_changes_nothing_before_it(implementation, x64):
    inputs, weights, options = make(**CASES["chunks"])
    inputs, weights = to_dtype((inputs, weights), "float32")
    own = slice(20, 50)
    ids = np.repeat([1, 0, 1], [20, 30, 15])
    options["segment_ids"] = jnp.asarray(np.tile(ids, (2, 1)))
    weights = np.where(ids[:, None] == 0, weights, 0)
    wanted = run(inputs, weights, **options, implementation=implementation)
    spoilt = inputs | {name: np.array(inputs[name]) for name in ("projected", "time_factor")}
    spoilt["projected"][:, 50:], spoilt["time_factor"][:, 19:20] = np.nan, np.inf
    got = run(spoilt, weights, **options, implementation=implementation)
    assert np.isnan(got["y"][:, 50:]).all() and not np.isnan(got["y"][:, :19]).any()
    got["y"], wanted["y"] = got["y"][:, own], wanted["y"][:, own]
    assert_same(got, wanted)


def test_rates_beyond_the_numbers_decay_not_at_all_or_at_once(x64):
    inputs, _, options = make(6, causal=True)
    inputs = to_dtype(inputs, np.float32)
    ends = {}
    for rate in (-1e3, -40.0, 40.0, 1e3):
        inputs["time_rate"] = np.full_like(inputs["time_rate"], rate)
        ends[rate] = time_aware_ssd_block(**inputs, **options, implementation="xla")
    np.testing.assert_allclose(ends[-1e3], ends[-40.0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ends[1e3], ends[40.0], rtol=1e-4, atol=1e-5)


def test_triton_takes_rates_beyond_the_numbers(triton):
    inputs, weights, options = make(6, batch=1, width=16, size=32, causal=True)
    inputs = to_dtype(inputs, np.float32)
    inputs["time_rate"] = inputs["time_rate"].at[0, 3, 0].set(95.0).at[0, 4, 1].set(-95.0)
    ours, theirs = (
        outcome(inputs, weights, implementation=name, **options) for name in ("triton", "xla")
    )
    for name, array in theirs.items():
        scale = float(np.abs(array).max())
        np.testing.assert_allclose(ours[name], array, atol=1e-4 * scale, err_msg=name)


def test_equals_the_block_written_out(x64):
    """The definition once more, one row and one position after the other."""
    inputs, _, options = make(9, batch=1, heads=4, groups=2, segments=True)
    block = jax.jit(lambda v: time_aware_ssd_block(**v, **options), compiler_options=QUICK)
    got = block(to_dtype(inputs, "float64"))[0]
    ids, size, heads = np.asarray(options["segment_ids"])[0], 8, 4
    z, mixed, dt = np.split(inputs["projected"][0], [20, 20 + 20 + 32], axis=-1)
    dt = np.logaddexp(0, dt * inputs["time_factor"][0] + inputs["dt_bias"])
    state = np.zeros((heads, 5, size))
    for t in range(9):
        restart = t > 0 and ids[t] != ids[t - 1]
        if t == 0 or restart:
            start = t
            state[:] = 0
        taps = [(3 - t + s, s) for s in range(max(start, t - 3), t + 1)]
        u = inputs["conv_bias"] + sum(inputs["conv_kernel"][k] * mixed[s] for k, s in taps)
        x, B, C = np.split(u * np.clip(u + 3, 0, 6) / 6, [20, 36])
        x, B, C = x.reshape(heads, 5), *(np.repeat(v.reshape(2, size), 2, axis=0) for v in (B, C))
        state *= np.exp(dt[t] * inputs["A"])[:, None, None]
        state += (dt[t][:, None] * x)[..., None] * B[:, None]
        y = np.einsum("hpn,hn->hp", state, C) + inputs["D"][:, None] * x
        gated = y.reshape(-1) * z[t] / (1 + np.exp(-z[t]))
        wanted = gated / np.sqrt(np.mean(gated**2) + 1e-5) * inputs["norm_scale"]
        np.testing.assert_allclose(got[t], wanted, rtol=1e-10)


def test_under_vmap_remat_and_on_eight_devices(tpu):
    """Two blocks at once, each with parameters of its own, and rows spread over devices."""
    options = make(20)[2] | {"chunk_size": 16, "implementation": "tpu"}
    inputs, weights, _ = make(20, batch=8)
    inputs, weights = to_dtype((inputs, weights), "float32")
    wanted = run(inputs, weights, **options)

    def remat(inputs, weights):
        block = jax.checkpoint(lambda inputs: time_aware_ssd_block(**inputs, **options))
        return jax.grad(lambda inputs: jnp.sum(block(inputs) * weights))(inputs)

    twice = jax.tree.map(lambda v: jnp.stack([v, v]), (inputs, weights))
    got = jax.jit(jax.vmap(remat), compiler_options=QUICK)(*twice)
    for row in range(2):
        one = jax.tree.map(lambda v, row=row: v[row], got)
        assert_same(one, {name: wanted[name] for name in one})

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in (("batch",), ())
    )
    spread = {
        name: jax.device_put(v, rows if name in ("projected", "time_factor") else whole)
        for name, v in inputs.items()
    }
    got = run(spread, jax.device_put(weights, rows), **options)
    assert got["y"].sharding.is_equivalent_to(rows, 3)
    assert_same(got, wanted)


def test_triton_under_vmap_and_remat(triton):
    """Two blocks at once, each with parameters of its own."""
    shape = {"batch": 1, "width": 16, "size": 16}
    options = make(17, **shape)[2] | {"chunk_size": 16, "implementation": "triton"}
    inputs, weights, _ = make(17, **shape)
    inputs, weights = to_dtype((inputs, weights), "float32")

    def remat(inputs, weights):
        block = jax.checkpoint(lambda inputs: time_aware_ssd_block(**inputs, **options))
        return jax.grad(lambda inputs: jnp.sum(block(inputs) * weights))(inputs)

    twice = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), (inputs, weights))
    got = jax.jit(jax.vmap(remat), compiler_options=QUICK)(*twice)
    for row in range(2):
        own = jax.tree.map(lambda v, row=row: v[row], twice)
        wanted = run(*own, **options | {"implementation": "xla"})
        one = jax.tree.map(lambda v, row=row: v[row], got)
        assert_close(one, {name: wanted[name] for name in one}, 1e-5)


@pytest.mark.parametrize(
    ("change", "capability", "message"),
    [
        ({"width": 24}, 90, "P must be one of 16, 32, 64, and it is 24"),
        ({"size": 128}, 90, "N must be one of 16, 32, 64, and it is 128"),
        ({"heads": 8, "width": 64}, 90, "all features of a chunk, at most 256, not 512"),
        ({"taps": 9}, 90, "at most 8 taps, not 9"),
        ({}, 75, "it needs an NVIDIA GPU of compute capability 8.0 or more"),
    ],
)
def test_triton_says_why_it_cannot_run(change, capability, message, triton):
    inputs, _, options = make(5, **{"width": 16, "size": 16} | change)
    arguments = to_dtype(inputs, "float32") | options
    with compile_for("gpu", capability):
        with pytest.raises(ValueError, match=message):
            time_aware_ssd_block(**arguments, implementation="triton")
        assert not has_kernel(**arguments)


def test_what_no_kernel_can_do_runs_around_that_of_the_op(triton, monkeypatch):
    launched = []

    def launch(kernel, inputs, outputs, **_):
        launched.append(kernel.fn.__name__)
        return [jnp.zeros(v.shape, v.dtype) for v in outputs]

    monkeypatch.setattr(triton_launch, "launch", launch)
    for width, name in ((16, "block_forward"), (64, "forward")):
        inputs, _, options = make(5, heads=8, width=width, size=16)
        arguments = to_dtype(inputs, "float32") | options
        jax.eval_shape(lambda arguments=arguments: time_aware_ssd_block(**arguments))
        assert set(launched) == {name} and has_kernel(**arguments) == (name == "block_forward")
        launched.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cuda"}, "no implementation 'cuda'; choose one of reference, xla"),
        ({"activation": "relu"}, "activation must be one of hardswish, silu, got 'relu'"),
        ({"groups": 3}, "H = 2 must divide the 10 features of norm_scale, and G = 3 H"),
        ({"state": 4}, r"projected must be \[B,L,2I\+2GN\+H\] = \[B,L,30\] and not empty"),
        (
            {"conv_kernel": jnp.ones((4, 3)), "conv_bias": jnp.ones(3)},
            r"shape \(4, 26\), got \(4, 3\)",
        ),
    ],
)
def test_says_what_is_wrong(change, message):
    inputs, _, options = make(5)
    with pytest.raises(ValueError, match=message):
        time_aware_ssd_block(**to_dtype(inputs, "float32") | options | change)
