"""Convolution, norms and activations against `golden/op_misc.npz`, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tim4rec_jax.layers import CausalConv, TimeAwareSSD
from tim4rec_jax.layers.basic import layer_norm
from tim4rec_jax.ssd.convolution import ACTIVATIONS

F64 = dict(dtype=jnp.float64, param_dtype=jnp.float64)


@pytest.fixture
def misc(golden, x64):
    # Inputs are float32 in the file: the reference's results are those of the float64 values.
    return {
        name: np.asarray(value, np.float64)
        for name, value in np.load(golden / "op_misc.npz").items()
    }


def conv(weight, bias):
    channels, width = weight.shape
    layer = CausalConv(channels, width, kaiming=False, rngs=nnx.Rngs(0), **F64)
    layer.kernel[...], layer.bias[...] = jax.device_put(weight.T), jax.device_put(bias)
    return layer


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "linear"])
def test_convolution(misc, activation):
    layer = conv(misc["conv/weight"], misc["conv/bias"])
    function = ACTIVATIONS.get(activation, lambda x: x)
    ours = function(layer(jax.device_put(misc["conv/x"])))
    np.testing.assert_allclose(ours, misc[f"conv/{activation}"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution_by_hand(x64, length):
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((3, 4)), rng.standard_normal(3)
    x = rng.standard_normal((2, length, 3))
    expected = np.zeros_like(x)
    for b, t, c in np.ndindex(x.shape):
        past = [x[b, t - 3 + k, c] if t - 3 + k >= 0 else 0.0 for k in range(4)]
        expected[b, t, c] = bias[c] + weight[c] @ past
    np.testing.assert_allclose(conv(weight, bias)(jax.device_put(x)), expected, atol=1e-13)


@pytest.mark.parametrize("name", [*ACTIVATIONS, "softplus"])
def test_activations(misc, name):
    function = ACTIVATIONS.get(name, jax.nn.softplus)
    x = jax.device_put(misc["act/x"])
    np.testing.assert_allclose(function(x), misc[f"act/{name}"], rtol=1e-8, atol=1e-14)


def test_gradient_of_hardswish(misc):
    x = misc["act/x"]
    smooth = np.abs(np.abs(x) - 3) > 1e-9  # at its two kinks any slope in between is right
    ours = jax.vmap(jax.grad(jax.nn.hard_swish))(jax.device_put(x))
    np.testing.assert_allclose(ours[smooth], misc["act/hardswish_grad"][smooth], atol=1e-14)


@pytest.mark.parametrize("eps", [1e-5, 1e-10, 1e-12])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_layer_norm_of_zeros_and_of_the_padding_spike(misc, eps, dtype):
    norm = layer_norm(50, eps, jnp.dtype(dtype), jnp.dtype(dtype), nnx.Rngs(0))
    norm.scale[...] = jnp.asarray(misc["ln/weight"], dtype)
    norm.bias[...] = jnp.asarray(misc["ln/bias"], dtype)
    ours = norm(jnp.asarray(misc["ln/x"], dtype))
    rtol = {"float64": 1e-12, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(ours, misc[f"ln/eps{eps:.0e}/y"], rtol=rtol, atol=rtol)
    assert ours.dtype == dtype


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_gated_rms_norm(misc, eps):
    settings = dict(state=4, head_width=8, expand=1, conv_width=4, chunk_size=None)
    settings |= dict(activation="silu", kaiming=True, eps=eps)
    # Shapes alone: each initial weight would be a program.
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: TimeAwareSSD(32, **settings, **F64, rngs=nnx.Rngs(0)))
    )
    zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), shapes)
    layer = nnx.merge(graph, zeros)
    layer.norm.scale[...] = jax.device_put(misc["rms/weight"])
    layer.out_proj.kernel[...] = jnp.eye(32)
    y = misc["rms/x"]
    ours = layer.output(
        jax.device_put(y.reshape(*y.shape[:-1], 4, 8)), jax.device_put(misc["rms/z"])
    )
    np.testing.assert_allclose(ours, misc[f"rms/eps{eps:.0e}_nbg0/y"], rtol=1e-12, atol=1e-13)
