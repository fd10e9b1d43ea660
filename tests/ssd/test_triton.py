"""The Triton kernels, in Triton's interpreter, and what stands between them and JAX."""

import dataclasses
import itertools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels need Triton: pip install '.[kernels]'")

import triton
import triton.language as tl

from tests.ssd import interpreter
from tests.ssd.cases import QUICK, Case, assert_close, for_triton, make, to_dtype
from tim4rec_jax.ssd import compile_for, ssd
from tim4rec_jax.ssd.batching import shard_over_batch
from tim4rec_jax.ssd.triton import block as triton_block
from tim4rec_jax.ssd.triton import common
from tim4rec_jax.ssd.triton import launch as triton_launch
from tim4rec_jax.ssd.triton import op as triton_op
from tim4rec_jax.ssd.triton.launch import table_key, tile_sizes

SMALL = for_triton(Case("small", 21, heads=4, groups=2, chunk_size=16, segments=True))


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
def test_without_what_is_optional(precision, triton):
    inputs, _, _ = make(dataclasses.replace(SMALL, initial_state=False))
    inputs = {name: jnp.asarray(inputs[name], jnp.float32) for name in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = jnp.abs(inputs["dt"])

    def gradient(implementation):
        def total(inputs):
            y = ssd(**inputs, implementation=implementation, precision=precision)
            return jnp.sum(y**2)

        return jax.jit(jax.grad(total), compiler_options=QUICK)(inputs)

    assert_close(gradient("triton"), gradient("reference"), 1e-5)


def test_every_row_has_its_own_segments(triton):
    inputs, _, _ = make(SMALL)
    inputs = to_dtype({name: inputs[name] for name in ("x", "A", "B", "C")}, "float32")
    inputs["dt"] = jnp.ones(inputs["x"].shape[:3])
    ids = jnp.asarray([[0] * 21, [0] * 7 + [1] * 14])
    got, wanted = (
        ssd(**inputs, segment_ids=ids, implementation=name) for name in ("triton", "reference")
    )
    assert_close({"y": got}, {"y": wanted}, 1e-5)


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
def test_says_why_it_cannot_run(change, capability, message, triton, monkeypatch):
    if capability is None:  # whatever this machine has

        def no_devices(**_):
            raise RuntimeError("no such platform")

        monkeypatch.setattr(jax, "local_devices", no_devices)
    inputs = to_dtype(make(dataclasses.replace(SMALL, **change))[0], "float32")
    with compile_for("gpu", capability), pytest.raises(ValueError, match=message):
        ssd(**inputs, implementation="triton")


def test_what_no_kernel_reads_is_left_to_xla(triton):
    inputs = to_dtype(make(SMALL)[0], "float32")
    inputs |= {name: inputs[name].astype(jnp.float8_e4m3fn) for name in ("x", "B", "C")}
    with pytest.raises(ValueError, match="it reads float32, bfloat16, float16, and an input is"):
        ssd(**inputs, implementation="triton")
    assert jax.eval_shape(lambda: ssd(**inputs)).shape == inputs["x"].shape


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


class Exact(NamedTuple):
    """What `operand` and `product` read of a specialisation."""

    PRECISION: str = "tf32x3"


@triton.jit
def multiply(a, b, high, low, total, S: tl.constexpr):
    """Writes the parts of `a`, and the product of `a` and `b`, all 32 x 32."""
    at = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    left, right = common.operand(tl.load(a + at), S), common.operand(tl.load(b + at), S)
    tl.store(high + at, left.high)
    tl.store(low + at, left.low)
    tl.store(total + at, common.product(left, right, S))


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "0", reason="it starts its kernel in the interpreter"
)
def test_three_products_of_tensor_cores_are_nearly_float32():
    rng = np.random.default_rng(0)
    shape = jax.ShapeDtypeStruct((32, 32), np.float32)
    tiles = triton_launch.TileSizes(32, 1, 1, 1)
    for exponents in (0, 8):  # numbers of one size, and of sizes 16 powers of two apart
        a, b = (
            (
                rng.normal(size=(32, 32)) * 2.0 ** rng.uniform(-exponents, exponents, (32, 32))
            ).astype(np.float32)
            for _ in range(2)
        )
        high, low, total = interpreter.launch(
            multiply,
            (jnp.asarray(a), jnp.asarray(b)),
            (shape,) * 3,
            programs=1,
            specialisation=Exact(),
            tiles=tiles,
        )
        wanted = a.astype(np.float64) @ b.astype(np.float64)

        def seen(v):
            """What tensor cores read of float32."""
            return (np.asarray(v).view(np.int32) & ~0x1FFF).view(np.float32).astype(np.float64)

        np.testing.assert_array_equal(seen(high), high)
        np.testing.assert_array_equal(np.float64(high) + np.float64(low), a)
        b_high = seen(b)
        b_low = seen(b - b_high.astype(np.float32))
        on_gpu = seen(high) @ b_high + seen(high) @ b_low + seen(low) @ b_high
        for result in (total, on_gpu):
            error = np.linalg.norm(result - wanted) / np.linalg.norm(wanted)
            assert error <= 2e-6


@pytest.mark.parametrize("precision", ["ieee", "tf32", "tf32x3"])
@pytest.mark.parametrize(
    ("kernel", "size"),
    [
        *itertools.product(("forward", "backward"), triton_launch.SIZES),
        *itertools.product(("block_forward", "block_backward"), triton_block.SIZES),
    ],
)
def test_every_shape_has_tile_sizes(kernel, size, precision):
    widest = triton_op.WIDEST_STATE | triton_block.WIDEST_STATE
    if precision == "tf32x3" and size > widest.get(kernel, 0):
        return  # never asked for
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
