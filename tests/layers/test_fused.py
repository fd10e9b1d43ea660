"""The SSD layers by one kernel equal the layers by their parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas

from tests.ssd.cases import QUICK, assert_close
from tim4rec_jax.layers import CausalSSD, TimeAwareSSD
from tim4rec_jax.layers import ssd as layers_ssd
from tim4rec_jax.layers.time import GapModulation
from tim4rec_jax.ssd import compile_for, time_aware_ssd_block

SETTINGS = dict(
    state=8,
    head_width=8,
    expand=2,
    conv_width=4,
    chunk_size=None,
    activation="silu",
    kaiming=False,
    eps=1e-6,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
)
RNG = np.random.default_rng(0)
H = jnp.asarray(RNG.normal(size=(2, 21, 16)), jnp.float32)
FACTOR = jnp.asarray(RNG.normal(size=(2, 21, 4)), jnp.float32)
SEGMENTS = jax.device_put(np.repeat([[0, 1, 2], [0, 0, 1]], 7, axis=1))


def test_the_causal_layer_hands_its_time_to_the_block(monkeypatch):
    layer = CausalSSD(16, **SETTINGS, rngs=nnx.Rngs(0))
    time = GapModulation(H[::-1], FACTOR, FACTOR[::-1])

    def run():
        def mix(h, time):  # a new function, as JAX would remember the program
            return layer(h, time, SEGMENTS)

        return {"y": jax.jit(mix, compiler_options=QUICK)(H, time)}

    wanted = run()
    blocks = []

    def block(**arguments):
        blocks.append(arguments)
        return time_aware_ssd_block(**arguments)

    monkeypatch.setattr(layers_ssd, "has_kernel", lambda **_: True)
    monkeypatch.setattr(layers_ssd, "time_aware_ssd_block", block)
    assert_close(run(), wanted, 1e-5)
    assert len(blocks) == 1


@pytest.mark.parametrize(
    ("kind", "arguments"), [(TimeAwareSSD, (FACTOR,)), (CausalSSD, (None, SEGMENTS))]
)
def test_the_kernel_equals_the_parts(kind, arguments, monkeypatch):
    graphdef, params = nnx.split(kind(16, **SETTINGS, rngs=nnx.Rngs(0)))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradients(params, h):
        def loss(params, h):
            return jnp.sum(nnx.merge(graphdef, params)(h, *arguments) ** 2)

        return jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(params, h))

    wanted = gradients(params, H)
    interpret = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", interpret)
    with compile_for("tpu"):
        assert "pallas_call" in str(gradients.trace(params, H).jaxpr)
        got = gradients(params, H)
    assert_close(dict(enumerate(got)), dict(enumerate(wanted)), 1e-5)
