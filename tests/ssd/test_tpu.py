"""What only the TPU kernels have: lanes shared by heads, and shapes they refuse."""

import jax
import jax.numpy as jnp
import pytest

from tests.ssd.cases import QUICK, Case, assert_close, make, outcome, quick, to_dtype
from tests.ssd.test_block import make as make_block
from tim4rec_jax.ssd import compile_for, ssd, time_aware_ssd_block


@pytest.mark.parametrize(
    "case",
    [
        Case("two tiles with two groups each", 20, heads=4, width=64, groups=4, chunk_size=16),
        Case("three tiles of one head", 20, heads=3, width=128, initial_state=False),
    ],
    ids=lambda case: case.name,
)
def test_more_features_than_lanes(case, tpu):
    inputs, weights, options = make(case)
    inputs, weights = to_dtype((inputs, weights), "float32")
    got = quick(inputs, weights, **options, implementation="tpu")
    wanted = quick(inputs, weights, **options, implementation="xla")
    assert_close(got, wanted, 1e-5)


def test_less_precision_is_still_more_than_asked_for(tpu):
    inputs, weights, options = make(Case("", 20, initial_state=False))
    inputs, weights = to_dtype((inputs, weights), "float32")
    run = jax.jit(
        lambda precision: outcome(
            inputs, weights, **options, precision=precision, implementation="tpu"
        ),
        static_argnums=0,
        compiler_options=QUICK,
    )
    got, wanted = run("tf32"), run("ieee")
    assert_close(got, wanted, 2e-5)
    assert not jnp.array_equal(got["y"], wanted["y"])


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
