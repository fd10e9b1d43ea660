"""The Triton kernels, in Triton's interpreter, and what stands between them and JAX."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install '.[kernels]'")

from tests.ssd.cases import (
    LENGTHS,
    OPTIONS,
    QUICK,
    REORDERED,
    TOLERANCE,
    TRAINED_CASES,
    Case,
    assert_close,
    make,
    outcome,
    quick,
    to_dtype,
)
from tim4rec_jax.ssd import compile_for, ssd
from tim4rec_jax.ssd.batching import shard_over_batch
from tim4rec_jax.ssd.triton import block as triton_block
from tim4rec_jax.ssd.triton import launch as triton_launch
from tim4rec_jax.ssd.triton.launch import table_key, tile_sizes

SIZES = {"width": 16, "size": 32}
SMALL = Case("small", 21, heads=4, groups=2, chunk_size=16, segments=True, **SIZES)
FAST = [
    *((dataclasses.replace(case, **SIZES), "float32") for case in (OPTIONS[0], OPTIONS[2])),
    *((case, "float32") for case in TRAINED_CASES),
    (Case("wide heads", 20, groups=2, width=128, size=64, segments=True), "float32"),
    (Case("D by channel", 20, heads=1, width=64, size=16, skip_per_channel=True), "bfloat16"),
    (Case("one chunk, no initial state", 20, initial_state=False, **SIZES), "float32"),
    (Case("dt limits", 30, chunk_size=16, dt_limit=(0.4, 0.9), **SIZES), "float32"),
]
HEAVY = [
    *((dataclasses.replace(case, **SIZES), "float32") for case in LENGTHS[:-1]),
    *((dataclasses.replace(case, **SIZES), "float32") for case in (OPTIONS[1], OPTIONS[3])),
    (Case("L1024", 1024, heads=1, width=16, size=16), "float32"),
    (Case("P > N", 40, heads=1, width=64, size=16, chunk_size=16), "float32"),
    (Case("no initial state", 33, chunk_size=16, initial_state=False, **SIZES), "float32"),
    (Case("dt = 0", 40, chunk_size=16, decay=2.0, still=True, **SIZES), "float32"),
    *((dataclasses.replace(case, **SIZES), "bfloat16") for case in OPTIONS[::2]),
    *((case, "bfloat16") for case in TRAINED_CASES),
    (Case("as trained, L200", 200, heads=4, width=32, size=32), "float32"),
]
RUNS = [*FAST, *(pytest.param(*run, marks=pytest.mark.slow) for run in HEAVY)]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=lambda v: getattr(v, "name", v))
def test_equals_the_float64_recurrence(case, dtype, x64, triton):
    inputs, weights, options = make(case, batch=1)
    inputs, weights = to_dtype((inputs, weights), dtype)
    got = outcome(inputs, weights, **options, implementation="triton")
    wanted = quick(*to_dtype((inputs, weights), "float64"), **options, implementation="reference")
    assert (got["y"].dtype, got["final_state"].dtype) == (dtype, "float32")
    assert_close(got, wanted, TOLERANCE[dtype])


def test_without_what_is_optional(triton):
    inputs, _, _ = make(dataclasses.replace(SMALL, initial_state=False))
    inputs = {name: jnp.asarray(inputs[name], jnp.float32) for name in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = jnp.abs(inputs["dt"])

    def gradient(implementation):
        def total(inputs):
            return jnp.sum(ssd(**inputs, implementation=implementation) ** 2)

        return jax.grad(total)(inputs)

    assert_close(gradient("triton"), gradient("reference"), 1e-5)


def test_extreme_steps_leave_finite_gradients(triton):
    inputs, weights, options = make(SMALL, batch=1)
    for step in (0.0, 80.0, 1e4):
        inputs["dt"][:, 1::3] = step
        arguments = to_dtype((inputs, weights), "float32")
        got = outcome(*arguments, **options, implementation="triton")
        assert all(np.isfinite(value).all() for value in got.values()), step


@pytest.mark.parametrize("shared", [True, False])
def test_under_jit_and_vmap(shared, triton):
    """Parameters of their own for each mapped row take another way."""
    (inputs, weights, options), (others, *_) = make(SMALL, batch=1), make(SMALL, batch=1)
    names = {"x", "dt", "B", "C", "initial_state"} | (set() if shared else {"A", "D"})
    rows = {name: np.stack([inputs[name], others[name] - 0.5]) for name in names}
    inputs, weights = to_dtype((inputs | rows, weights), "float32")
    axes = {name: 0 if name in names else None for name in inputs}
    options["implementation"] = "triton"

    def run(inputs):
        return outcome(inputs, weights, **options)

    got = jax.jit(jax.vmap(run, in_axes=(axes,)), compiler_options=QUICK)(inputs)
    for row in range(2):
        alone = {name: v[row] if name in names else v for name, v in inputs.items()}
        assert_close({name: v[row] for name, v in got.items()}, run(alone), REORDERED)


def test_under_remat(triton):
    inputs, weights, options = make(SMALL)
    inputs, weights = to_dtype((inputs, weights), "float32")
    options["implementation"] = "triton"
    wanted = outcome(inputs, weights, **options)

    def objective(inputs):
        results = jax.checkpoint(lambda v: ssd(**v, return_final_state=True, **options))(inputs)
        return sum(jnp.sum(r * w) for r, w in zip(results, weights, strict=True))

    got = jax.grad(objective)(inputs)
    assert_close(got, {name: wanted[name] for name in got}, REORDERED)


def test_rows_stay_on_their_devices():
    """The kernel's place is taken by a sum; a callback cannot be partitioned."""
    rows = [np.arange(24.0).reshape(8, 3), np.arange(16.0).reshape(8, 2)]
    scale = np.arange(2.0)

    def call(rows, scale):
        return shard_over_batch(lambda r, s: (r[0].sum(1), r[1] * s), rows, scale)

    mesh = jax.make_mesh(
        (8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")
    )
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    arguments = (jax.device_put(rows, by_row), scale)
    program = jax.jit(call).lower(*arguments).compile()
    assert not any(op in program.as_text() for op in ("all-gather", "all-to-all", "all-reduce"))
    first, second = program(*arguments)
    assert first.sharding.is_equivalent_to(by_row, 1) and second.sharding == first.sharding
    np.testing.assert_array_equal(first, rows[0].sum(1))
    np.testing.assert_array_equal(second, rows[1] * scale)


@pytest.mark.parametrize(
    ("change", "capability", "message"),
    [
        ({"width": 24}, 90, "P must be one of 16, 32, 64, 128, and it is 24"),
        ({"size": 8}, 90, "N must be one of 16, 32, 64, 128, and it is 8"),
        ({}, 75, "it needs an NVIDIA GPU of compute capability 8.0 or more"),
        ({}, None, "it needs an NVIDIA GPU"),
    ],
)
def test_says_why_it_cannot_run(change, capability, message, triton):
    inputs = to_dtype(make(dataclasses.replace(SMALL, **change))[0], "float32")
    with compile_for("gpu", capability), pytest.raises(ValueError, match=message):
        ssd(**inputs, implementation="triton")


def test_float64_and_other_platforms_are_refused(triton, x64):
    inputs = to_dtype(make(SMALL)[0], "float64")
    with pytest.raises(ValueError, match="float32 and an input is float64"):
        ssd(**inputs, implementation="triton")
    with compile_for("cpu"), pytest.raises(ValueError, match="runs on the platform 'gpu'"):
        ssd(**inputs, implementation="triton")
    assert jax.eval_shape(lambda: ssd(**inputs)).dtype == "float64"


def test_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_launch.importlib.util, "find_spec", lambda name: None)
    inputs = to_dtype(make(SMALL)[0], "float32")
    with compile_for("gpu", 90), pytest.raises(ValueError, match=r"'tim4rec-jax\[triton\]'"):
        ssd(**inputs, implementation="triton")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        *itertools.product(("forward", "backward"), triton_launch.SIZES),
        *itertools.product(("block_forward", "block_backward"), triton_block.SIZES),
    ],
)
def test_every_shape_has_tile_sizes(kernel, size, precision):
    for length, heads, limit in itertools.product((1, 17, 64, 1000), (1, 3, 4), (None, 1, 40)):
        shape = {"length": length, "heads": heads, "size": size, "precision": precision}
        with compile_for("gpu", 90):
            tiles = tile_sizes(kernel, **shape, largest_chunk=limit)
        assert tiles.chunk in (16, 32, 64) and heads % tiles.heads == 0
        assert tiles.chunk < 2 * max(16, length) and tiles.chunk <= max(16, limit or 64)


def test_measured_sizes_of_a_gpu_come_first(monkeypatch):
    monkeypatch.setattr(
        triton_launch,
        "read_table",
        lambda: {
            table_key("forward", None, True, 32, "ieee"): [64, 4, 4, 1],
            table_key("forward", 90, True, 32, "ieee"): [32, 2, 8, 3],
        },
    )
    shape = {"length": 60, "heads": 4, "size": 16, "precision": "ieee"}
    with compile_for("gpu", 90):
        assert tile_sizes("forward", **shape) == (32, 2, 8, 3)
    with compile_for("gpu", 80):
        assert tile_sizes("forward", **shape) == (64, 4, 4, 1)
