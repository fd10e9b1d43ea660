"""What all layers that mix a sequence have in common: segments, padding, steps, checks, export."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.ssd.cases import QUICK
from tim4rec_jax.layers import (
    CausalConv,
    CausalSSD,
    FeedForward,
    GapModulator,
    TimeAwareSSD,
    TimeEncoder,
    TimeMixer,
    gap_features,
)
from tim4rec_jax.layers.attention import Attention, EncoderLayer, causal_mask
from tim4rec_jax.layers.gru import GRU
from tim4rec_jax.layers.lru import LRU
from tim4rec_jax.layers.mamba import Mamba
from tim4rec_jax.ssd.segments import starts

WIDTH, LENGTH = 16, 12
GAPS = np.linspace(0, 3e4, 2 * LENGTH, dtype=np.float32).reshape(2, LENGTH)


class Timed(nnx.Module):
    """A `CausalSSD` with its functions of the gaps, which do something."""

    def __init__(self, width, *, rngs):
        self.layer = CausalSSD(width, head_width=8, state=8, rngs=rngs)
        self.modulator = GapModulator(width, self.layer.heads)
        self.modulator.kernel[...] += 0.1

    def __call__(self, h, ids, gaps=GAPS):
        return self.layer(h, self.modulator(gap_features(gaps)), ids)


def by_rows(layer, h, ids):
    return layer(h.swapaxes(0, 1), starts(ids).T).swapaxes(0, 1)


def by_mask(layer, h, ids):
    return layer(h, causal_mask(h.shape[1], ids), causal=True)


SMALL = {"state": 8, "head_width": 8}
LAYERS = {
    "CausalSSD": (CausalSSD, SMALL, lambda layer, h, ids: layer(h, None, ids)),
    "with gaps": (Timed, {}, lambda layer, h, ids: layer(h, ids)),
    "TimeAwareSSD": (TimeAwareSSD, SMALL, lambda layer, h, ids: layer(h, None, ids)),
    "Mamba": (Mamba, {"state": 8}, lambda layer, h, ids: layer(h, ids)),
    "LRU": (LRU, {"states": 8}, lambda layer, h, ids: layer(h, ids)),
    "CausalConv": (CausalConv, {}, lambda layer, h, ids: layer(h, ids)),
    "GRU": (functools.partial(GRU, WIDTH), {}, by_rows),
    "Attention": (Attention, {"heads": 2}, by_mask),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name):
    """The parts of a layer with weights from numpy, as each initial weight would be a program."""
    make, settings, call = LAYERS[name]
    graph, shapes = nnx.split(nnx.eval_shape(lambda: make(WIDTH, **settings, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda v: jnp.asarray(0.5 * rng.standard_normal(v.shape), v.dtype), shapes
    )
    return weights, lambda weights, h, ids: call(nnx.merge(graph, weights), h, ids)


H = np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)
IDS = np.tile(np.repeat([3, 1, 3, 8], [2, 3, 4, 3]), (2, 1))
OWN = slice(5, 9)  # the second 3


@every_layer
def test_segments_and_padding_keep_to_themselves(name):
    """One program: values at some positions, and the gradient of a loss of them."""
    weights, call = build(name)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(weights, h, ids, counts):
        def loss(weights, h):
            y = call(weights, h, ids)
            return jnp.sum(jnp.cos(y), where=counts), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, h)

    def check(got, wanted, positions):
        (_, y), gradients = got
        (_, y_wanted), gradients_wanted = wanted
        np.testing.assert_allclose(y[:, positions], y_wanted[:, positions], atol=1e-6)
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        return y

    def counting(positions):
        counts = np.zeros((2, LENGTH, 1), bool)
        counts[:, positions] = True
        return counts

    spoilt = np.full_like(H, np.nan)
    spoilt[:, OWN], spoilt[0, 9:], spoilt[1, :3] = H[:, OWN], np.inf, -np.inf
    wanted = run(weights, H, IDS, counting(OWN))
    y = check(run(weights, spoilt, IDS, counting(OWN)), wanted, OWN)
    assert np.isnan(np.delete(y, np.r_[OWN], axis=1)).all()

    # The segment alone, at the start of a row whose rest is padding.
    alone = np.full_like(H, np.nan)
    alone[:, :4] = H[:, OWN]
    (_, y), _ = run(weights, alone, np.zeros_like(IDS), counting(slice(4)))
    if name != "with gaps":  # the gaps are those of the positions
        np.testing.assert_allclose(y[:, :4], wanted[0][1][:, OWN], atol=1e-5)
    zeros = np.where(np.isnan(alone), 0, alone).astype(np.float32)
    plain = run(weights, zeros, np.zeros_like(IDS), counting(slice(4)))
    check(run(weights, alone, np.zeros_like(IDS), counting(slice(4))), plain, slice(4))


def test_a_gap_that_is_no_number_spoils_no_other_position():
    weights, _ = build("with gaps")
    graph = nnx.graphdef(nnx.eval_shape(lambda: Timed(WIDTH, rngs=nnx.Rngs(0))))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradient(weights, gaps):
        def loss(weights):
            return jnp.sum(nnx.merge(graph, weights)(H, IDS, gaps)[:, :8] ** 2)

        return jax.tree.leaves(jax.grad(loss)(weights))

    gaps = GAPS.copy()
    gaps[:, 8:] = np.nan
    for a, b in zip(gradient(weights, gaps), gradient(weights, GAPS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@every_layer
def test_takes_numpy_arrays_and_symbolic_shapes(name):
    weights, call = build(name)
    shape = jax.eval_shape(lambda: call(weights, H, IDS)).shape
    assert shape == H.shape
    if name == "with gaps":
        return
    rows, length = jax.export.symbolic_shape("rows, length")
    h = jax.ShapeDtypeStruct((rows, length, WIDTH), H.dtype)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    program = jax.export.export(jax.jit(functools.partial(call, weights)))(h, ids)
    assert program.out_avals[0].shape == h.shape


@pytest.mark.slow
@every_layer
def test_an_exported_program_computes_the_same(name):
    if name == "with gaps":
        pytest.skip("the gaps of this test have one shape")
    weights, call = build(name)
    run = functools.partial(call, weights)
    rows, length = jax.export.symbolic_shape("rows, length")
    h = jax.ShapeDtypeStruct((rows, length, WIDTH), H.dtype)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    program = jax.export.export(jax.jit(run))(h, ids)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(np.float64), weights)
        truth = np.asarray(call(double, H.astype(np.float64), IDS))
    # The programs round in another order. A value is a sum of `LENGTH` states and of `WIDTH`
    # products. A state has decayed up to `LENGTH` times by exp(x), of which |x| roundings come
    # with x; |x| is less than 2 * WIDTH here. That is less than 100 roundings of half a unit.
    bound = 50 * np.finfo(np.float32).eps * np.abs(truth).max()
    for size in (1, 5, LENGTH):
        inputs = H[:, :size], IDS[:, :size].astype(np.int32)
        np.testing.assert_allclose(program.call(*inputs), truth[:, :size], rtol=0, atol=bound)


def test_the_layer_of_the_paper_goes_on_position_by_position():
    weights, _ = build("TimeAwareSSD")
    layer = nnx.eval_shape(lambda: TimeAwareSSD(WIDTH, **SMALL, rngs=nnx.Rngs(0)))
    factor = np.abs(np.random.default_rng(2).normal(size=(2, LENGTH, layer.heads)))
    graph = nnx.graphdef(layer)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(weights, h, factor):
        layer = nnx.merge(graph, weights)

        def step(state, inputs):
            return layer.step(state, *inputs)

        inputs = h.swapaxes(0, 1), factor.swapaxes(0, 1)
        _, outputs = jax.lax.scan(step, layer.init_state(2), inputs)
        return layer(h, factor), outputs.swapaxes(0, 1)

    whole, steps = run(weights, H, factor.astype(np.float32))
    np.testing.assert_allclose(steps, whole, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", [TimeAwareSSD, CausalSSD, Mamba])
def test_a_state_keeps_its_dtype(kind, dtype):
    sizes = SMALL if kind is not Mamba else {}
    layer = nnx.eval_shape(
        lambda: kind(WIDTH, **sizes, dtype=dtype, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    state = jax.eval_shape(lambda: layer.init_state(2))
    after, _ = nnx.eval_shape(lambda layer, h: layer.step(layer.init_state(2), h), layer, H[:, 0])
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)


def shapes_of(layer, *args, **settings):
    return nnx.eval_shape(lambda: layer(*args, **settings, rngs=nnx.Rngs(0)))


def test_the_defaults_are_those_of_the_paper():
    layer = shapes_of(TimeAwareSSD, 64)
    assert (layer.heads, layer.head_width, layer.state, layer.inner) == (4, 32, 32, 128)
    assert layer.conv.kernel.shape == (4, 192) and layer.norm.epsilon == 1e-12
    # The published code applies SiLU where it has a multiple of eight heads.
    assert (layer.activation, shapes_of(CausalSSD, 128).activation) == ("hardswish", "silu")
    assert shapes_of(TimeMixer, 50, 4).activation == "hardswish"
    shapes_of(EncoderLayer, 32), shapes_of(TimeEncoder, 50), shapes_of(LRU, 8)


@pytest.mark.parametrize(
    ("layer", "arguments", "settings", "message"),
    [
        (TimeAwareSSD, (64,), {"head_width": 48}, r"head_width must divide expand \* width = 128"),
        (CausalSSD, (64,), {"activation": "relu"}, "activation must be 'hardswish' or 'silu', got"),
        (CausalSSD, (64,), {"activation": jax.nn.relu}, "activation must be 'hardswish' or 'silu'"),
        (CausalSSD, (0,), {}, "width must be a whole number of 1 or more, got 0"),
        (CausalSSD, (64,), {"state": 0}, "state must be a whole number of 1 or more, got 0"),
        (CausalSSD, (64,), {"chunk_size": 0}, "chunk_size must be a whole number of 1 or more"),
        (CausalSSD, (64,), {"eps": -1.0}, "eps must be a number of 0 or more, got -1.0"),
        (
            FeedForward,
            (8,),
            {"activation": "swish"},
            "activation must be a function or one of",
        ),
        (FeedForward, (8,), {"dropout_rate": 1.0}, r"dropout_rate must be a number in \[0, 1\)"),
        (Mamba, (8,), {"conv_width": 0}, "conv_width must be a whole number of 1 or more, got 0"),
        (Attention, (8, 3), {}, "heads must divide width = 8, got 3"),
        (GRU, (8, 0), {}, "width must be a whole number of 1 or more, got 0"),
        (LRU, (8,), {"states": 0}, "states must be a whole number of 1 or more, got 0"),
        (TimeMixer, (8, 2), {"activation": "gelu"}, "activation must be 'hardswish' or 'silu'"),
        (CausalConv, (8, 0), {}, "width must be a whole number of 1 or more, got 0"),
    ],
)
def test_constructors_name_the_wrong_argument(layer, arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        layer(*arguments, **settings, rngs=nnx.Rngs(0))


def test_activations_have_names():
    assert shapes_of(FeedForward, 8, activation="silu").activation is jax.nn.silu
    assert shapes_of(CausalSSD, 64, activation=jax.nn.silu).activation == "silu"


@pytest.mark.parametrize(
    ("h", "others", "message"),
    [
        ((2, 5, 8), {}, r"h must be \[B,L,16\], got shape \(2, 5, 8\)"),
        ((5, 16), {}, r"h must be \[B,L,16\], got shape \(5, 16\)"),
        ((2, 5, 16), {"factor": (2, 5, 3)}, r"factor must be \[2,5,4\], got shape \(2, 5, 3\)"),
        ((2, 5, 16), {"segment_ids": (2, 4)}, r"segment_ids must be \[2,5\], got shape \(2, 4\)"),
    ],
)
def test_calls_name_the_wrong_argument(h, others, message, no_shape_checks):
    layer = shapes_of(TimeAwareSSD, WIDTH, **SMALL)
    arrays = {k: np.zeros(v, int if k == "segment_ids" else np.float32) for k, v in others.items()}
    with pytest.raises(ValueError, match=message):
        layer(np.zeros(h, np.float32), **arrays)
