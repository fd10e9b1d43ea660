"""What only the TPU kernels have: lanes shared by heads, and shapes they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ssd.cases import QUICK, Case, assert_close, exact, make, outcome, quick, to_dtype
from tests.ssd.test_block import make as make_block
from tim4rec_jax.ssd import compile_for, ssd, time_aware_ssd_block


@pytest.mark.parametrize(
    "case",
    [
        Case("two tiles with two groups each", 20, heads=4, width=64, groups=4, chunk_size=16),
        pytest.param(
            Case("three tiles of one head", 20, heads=3, width=128, initial_state=False),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda case: case.name,
)
def test_more_features_than_lanes(case, tpu, x64):
    inputs, weights, options = make(case)
    wanted = exact(inputs, weights, **options)
    got = quick(*to_dtype((inputs, weights), "float32"), **options, implementation="tpu")
    assert_close(got, wanted, 1e-5)


def test_less_precision_is_still_more_than_asked_for(tpu, x64):
    """Three products of bfloat16 numbers replace one of float32 numbers.

    Both factors keep 16 bits: each loses at most 2^-18 of itself, and the product of the two
    lower halves, at most 2^-18, is left out. So one matrix product is wrong by at most 3 / 2^18 =
    1.1e-5 of the sum of its terms' magnitudes. No result passes through more than three products,
    whose errors are independent: sqrt(3) * 1.1e-5 = 2e-5.
    """
    inputs, weights, options = make(Case("", 20, initial_state=False))
    wanted = exact(inputs, weights, **options)
    run = functools.partial(outcome, **options, precision="tf32", implementation="tpu")
    got = jax.jit(run, compiler_options=QUICK)(*to_dtype((inputs, weights), "float32"))
    # A float32 product would be right to 1e-7.
    difference = np.linalg.norm(got["y"] - wanted["y"])
    assert difference > 1e-6 * np.linalg.norm(wanted["y"])
    # The gradient of dt_bias is the sum of the gradients of dt, and these cancel each other: the
    # sum of their magnitudes is 25 times as large as their sum.
    magnitudes = np.abs(wanted["dt"]).sum(axis=(0, 1))
    difference = np.linalg.norm(got.pop("dt_bias") - wanted.pop("dt_bias"))
    assert difference <= 2e-5 * np.linalg.norm(magnitudes)
    assert_close(got, wanted, 2e-5)


def test_says_why_it_cannot_run(x64):
    inputs, _, options = make(Case("", 4))
    narrow, wide = to_dtype(inputs, "float32"), to_dtype(inputs, "float64")
    with pytest.raises(ValueError, match="'tpu' runs on the platform 'tpu', and this is 'cpu'"):
        ssd(**narrow, **options, implementation="tpu")
    with compile_for("tpu"):
        with pytest.raises(ValueError, match="'tpu' cannot run: a TPU has no float64"):
            ssd(**wide, **options, implementation="tpu")
        assert jax.eval_shape(lambda: ssd(**wide, **options)).dtype == jnp.float64  # by "xla"
        huge = narrow | {"x": jnp.zeros((2, 4, 2, 2**16), "float32"), "initial_state": None}
        with pytest.raises(ValueError, match="a chunk of one row does not fit VMEM"):
            ssd(**huge, **options, implementation="tpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 3}, "the state must be a multiple of 8 numbers, not 3"),
        ({"taps": 10}, "the convolution must have at most 9 taps"),
    ],
)
def test_the_block_says_why_it_cannot_run(change, message):
    inputs, _, options = make_block(4, **change)
    arguments = to_dtype(inputs, "float32") | options
    with compile_for("tpu"), pytest.raises(ValueError, match=f"'tpu' cannot run: {message}"):
        time_aware_ssd_block(**arguments, implementation="tpu")
