"""The Triton kernels, in Triton's interpreter, and what stands between them and JAX."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install '.[kernels]'")

from tests.ssd.cases import QUICK, Case, assert_close, for_triton, make, to_dtype
from tim4rec_jax.ssd import compile_for, ssd
from tim4rec_jax.ssd.batching import shard_over_batch
from tim4rec_jax.ssd.triton import block as triton_block
from tim4rec_jax.ssd.triton import launch as triton_launch
from tim4rec_jax.ssd.triton.launch import table_key, tile_sizes

SMALL = for_triton(Case("small", 21, heads=4, groups=2, chunk_size=16, segments=True))


def test_without_what_is_optional(triton):
    inputs, _, _ = make(dataclasses.replace(SMALL, initial_state=False))
    inputs = {name: jnp.asarray(inputs[name], jnp.float32) for name in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = jnp.abs(inputs["dt"])

    def gradient(implementation):
        def total(inputs):
            return jnp.sum(ssd(**inputs, implementation=implementation) ** 2)

        return jax.jit(jax.grad(total), compiler_options=QUICK)(inputs)

    assert_close(gradient("triton"), gradient("reference"), 1e-5)


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
