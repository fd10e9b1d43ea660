"""TiM4Rec: the shortcut to the last position, what may not matter, bfloat16, the wide model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small_models import jit, small_model
from tim4rec_jax.data import time_gaps
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.models import build
from tim4rec_jax.training.objectives import prefix_loss

SETTINGS = {
    "name": "tim4rec",
    "time_encoding": "masked",
    "dtype": "float32",
    "hidden_size": 16,
    "num_layers": 2,
    "dropout_prob": 0.2,
    "time_drop_out": 0.2,
    "d_state": 8,
    "d_conv": 4,
    "expand": 2,
    "head_dim": 8,
    "chunk_size": 0,
    "norm_eps": 1e-12,
    "is_ffn": True,
    "is_time": True,
    "p2p_residual": False,
    "is_kai_ming_init": False,
}
MAX_LENGTH, BUCKET, ITEMS = 12, 8, 30
LENGTHS = np.array([1, 2, 5, 8, 12])
IN_BUCKET = LENGTHS <= BUCKET


def batch(seed=0):
    rng = np.random.default_rng(seed)
    real = np.arange(MAX_LENGTH) < LENGTHS[:, None]
    items = np.where(real, rng.integers(1, ITEMS + 1, real.shape), 0).astype(np.int32)
    times = 880_000_000 + np.cumsum(rng.exponential(5000, real.shape), axis=1).astype(np.int64)
    return items, np.where(real, times, 0), real


def split_model(param_dtype=jnp.float32, **settings):
    sizes = dict(n_items=ITEMS, max_length=MAX_LENGTH, param_dtype=param_dtype)
    return small_model(SETTINGS | settings, spread=0.2, **sizes)


@jit
def call(graph, params, items, lengths, gaps):
    return nnx.merge(graph, params)(items, lengths, gaps)


@jit
def encode_and_call(graph, params, items, lengths, gaps):
    model = nnx.merge(graph, params)
    return model.encode(items, lengths, gaps), model(items, lengths, gaps)


def encode(*arguments):
    return encode_and_call(*arguments)[0]


def slow(settings):
    return pytest.param(settings, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        # The golden files have these: what `encode` gives, and in a shorter bucket.
        slow({"time_encoding": "paper", "p2p_residual": True}),
        slow({"num_layers": 1, "time_encoding": "paper"}),
        {"num_layers": 1, "is_time": False, "is_ffn": False},
        slow({"is_ffn": False, "is_kai_ming_init": True}),
    ],
    ids=str,
)
def test_encode_is_the_state_at_the_last_event_in_any_bucket(x64, settings):
    graph, params = split_model(jnp.float64, **settings)
    items, times, _ = batch()
    paper = settings.get("time_encoding") == "paper"
    gaps = time_gaps(times, LENGTHS, "recbole" if paper else "exact")
    encoded, states = encode_and_call(graph, params, items, LENGTHS, gaps)
    hidden = np.asarray(states)[np.arange(len(LENGTHS)), LENGTHS - 1]
    np.testing.assert_allclose(encoded, hidden, rtol=1e-10)
    assert np.ptp(hidden, axis=0).min() > 1e-3  # rows differ: the comparison says something
    inputs = items[IN_BUCKET, :BUCKET], LENGTHS[IN_BUCKET], gaps[IN_BUCKET]
    np.testing.assert_allclose(encode(graph, params, *inputs), hidden[IN_BUCKET], rtol=1e-10)


def test_only_real_events_matter_to_masked(x64):
    graph, params = split_model(jnp.float64)
    items, times, real = batch()
    gaps = time_gaps(times, LENGTHS, "exact")
    expected = encode(graph, params, items, LENGTHS, gaps)
    spoilt = np.where(real, items, 7), LENGTHS, np.where(real, gaps, np.float32(-1e9))
    np.testing.assert_allclose(encode(graph, params, *spoilt), expected, rtol=1e-12)
    # The real gaps do matter.
    others = gaps * np.linspace(0.5, 2, MAX_LENGTH, dtype=np.float32)
    change = np.abs(encode(graph, params, items, LENGTHS, others) - expected).max(axis=1)
    assert np.all(change[LENGTHS > 2] > 1e-6)


def test_paper_sees_what_lies_after_the_length(x64):
    graph, params = split_model(jnp.float64, time_encoding="paper")
    items, times, _ = batch()
    states = [
        encode(graph, params, items, LENGTHS, time_gaps(times, LENGTHS, convention))
        for convention in ("recbole", "exact")
    ]
    padded = LENGTHS < MAX_LENGTH
    assert np.all(np.abs(states[0] - states[1]).max(axis=1)[padded & (LENGTHS > 2)] > 1e-6)


@jit
def state_and_gradients(graph, params, rows, seeds):
    def loss(params):
        return prefix_loss(nnx.merge(graph, params), rows, seeds)

    state = nnx.merge(graph, params).encode(rows["items"], rows["lengths"], rows["gaps"])
    return state, *jax.value_and_grad(loss)(params)


def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters():
    items, times, _ = batch()
    rows = {
        "items": items,
        "lengths": LENGTHS.astype(np.int32),
        "gaps": time_gaps(times, LENGTHS, "exact"),
        "targets": np.arange(1, len(LENGTHS) + 1, dtype=np.int32),
        "weights": np.ones(len(LENGTHS), np.float32),
    }
    seeds = row_seeds(jax.random.key(0), len(LENGTHS))
    found = {}
    for dtype in ("float32", "bfloat16"):
        graph, params = split_model(dtype=dtype, num_layers=1)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        state, loss, grads = state_and_gradients(graph, params, rows, seeds)
        assert state.dtype == dtype
        assert loss.dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
        found[dtype] = [np.asarray(value, np.float32) for value in (state, loss, flat)]
    for exact, narrow in zip(found["float32"], found["bfloat16"], strict=True):
        assert 0 < np.linalg.norm(narrow - exact) < 3e-2 * np.linalg.norm(exact)


# The fast suite has the operator with these sizes and other chunks in tests/ssd.
@pytest.mark.slow
def test_the_wide_model_whatever_its_chunks():
    wide = dict(hidden_size=256, d_state=64, head_dim=128, num_layers=1)
    items = np.random.default_rng(0).integers(1, ITEMS + 1, (1, 48)).astype(np.int32)
    gaps = np.linspace(0, 1e6, 48, dtype=np.float32)[None]
    states = []
    for chunk_size in (32, 5):
        model = build(SETTINGS | wide | {"chunk_size": chunk_size}, n_items=ITEMS, max_length=48)
        states.append(call(*nnx.split(model), items, np.array([48]), gaps))
    assert states[0].shape == (1, 48, 256)
    np.testing.assert_allclose(states[1], states[0], rtol=1e-4, atol=1e-4)
