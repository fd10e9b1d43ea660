"""The causal model: sees nothing ahead, keeps histories apart, streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small_models import jit, small_model
from tests.models.test_tim4rec import SETTINGS
from tim4rec_jax.layers import gap_features
from tim4rec_jax.layers.time import KNOTS
from tim4rec_jax.models import CausalTiM4Rec, build

ITEMS, LENGTH, ROWS = 30, 12, 4
CAUSAL = SETTINGS | {"time_encoding": "causal", "knows_next_time": False}


def make(max_length=LENGTH, **settings):
    return _make(max_length, tuple(settings.items()))


@functools.cache
def _make(max_length, settings):
    sizes = dict(n_items=ITEMS, max_length=max_length)
    graph, params = small_model(CAUSAL | dict(settings), spread=0.3, **sizes)
    assert isinstance(nnx.merge(graph, params), CausalTiM4Rec)
    return graph, params


def histories(seed=0):
    rng = np.random.default_rng(seed)
    items = rng.integers(1, ITEMS + 1, (ROWS, LENGTH), dtype=np.int32)
    gaps = np.exp(rng.uniform(-1, 18, (ROWS, LENGTH))).astype(np.float32)
    gaps[:, 0] = 0
    gaps[:, 5] = 0  # a tie
    return items, gaps


@jit
def whole_and_packed(graph, params, items, gaps, segment_ids):
    model, lengths = nnx.merge(graph, params), jnp.full(ROWS, LENGTH)
    return model(items, lengths, gaps), model(items, lengths, gaps, segment_ids=segment_ids)


def call(graph, params, items, gaps):
    return whole_and_packed(graph, params, items, gaps, np.zeros_like(items))[0]


@jit
def encode_and_call(graph, params, items, lengths, gaps):
    model = nnx.merge(graph, params)
    return model.encode(items, lengths, gaps), model(items, lengths, gaps)


@jit
def step(graph, params, state, items, gaps):
    return nnx.merge(graph, params).step(state, items, gaps)


VARIANTS = [
    {},
    {"num_layers": 1, "is_time": False},
    {"num_layers": 1, "is_ffn": False, "band_events": 3},
    pytest.param({"is_time": False}, marks=pytest.mark.slow),
    pytest.param({"chunk_size": 5}, marks=pytest.mark.slow),
]
variants = pytest.mark.parametrize("settings", VARIANTS, ids=str)


@variants
def test_nothing_ahead_matters_and_everything_before_does(settings):
    model = make(**settings)
    items, gaps = histories()
    before = np.asarray(call(*model, items, gaps))
    for position in (0, 4, 11):
        for changed in ("items", "gaps"):
            if changed == "gaps" and settings.get("is_time") is False:
                continue
            other_items, other_gaps = items.copy(), gaps.copy()
            if changed == "items":
                other_items[:, position] = other_items[:, position] % ITEMS + 1
            else:
                other_gaps[:, position] = 3e6
            after = np.asarray(call(*model, other_items, other_gaps))
            moved = np.abs(after - before).max(axis=(0, 2))
            assert (moved[:position] == 0).all()
            assert (moved[position : position + 3] > 1e-4).all(), (changed, position, moved)


@variants
def test_histories_in_one_row_do_not_see_each_other(settings):
    model = make(**settings)
    items, gaps = histories()
    alone = np.asarray(call(*model, items, gaps))
    cuts = [(0, 7), (1, 2), (2, 3)]
    # One row of three histories, as often as there are rows.
    row = np.tile(np.concatenate([items[user, :n] for user, n in cuts]), (ROWS, 1))
    row_gaps = np.tile(np.concatenate([gaps[user, :n] for user, n in cuts]), (ROWS, 1))
    ids = np.tile(np.repeat(np.arange(3, dtype=np.int32), [n for _, n in cuts]), (ROWS, 1))
    mixed, together = map(np.asarray, whole_and_packed(*model, row, row_gaps, ids))
    expected = np.concatenate([alone[user, :n] for user, n in cuts])
    np.testing.assert_allclose(together[0], expected, atol=1e-5)
    assert np.abs(mixed[0] - expected).max() > 1e-2  # without the ids they do


@variants
def test_steps_give_what_the_whole_history_gives(settings):
    graph, params = make(**settings)
    items, gaps = histories()
    whole = np.asarray(call(graph, params, items, gaps))
    state = nnx.merge(graph, params).init_state(ROWS)
    sizes = [leaf.shape for leaf in jax.tree.leaves(state)]
    for position in range(LENGTH):
        state, hidden = step(graph, params, state, items[:, position], gaps[:, position])
        np.testing.assert_allclose(hidden, whole[:, position], atol=1e-5)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == sizes


def test_encode_is_the_state_at_the_last_event(x64):
    sizes = dict(n_items=ITEMS, max_length=LENGTH, param_dtype=jnp.float64)
    graph, params = small_model(CAUSAL, spread=0.3, **sizes)
    items, gaps = histories()
    lengths = np.array([1, 3, 12, 7], np.int32)
    found, states = encode_and_call(graph, params, items, lengths, gaps)
    expected = np.asarray(states)[np.arange(ROWS), lengths - 1]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_no_weight_depends_on_the_length():
    shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(make(length)[1])) for length in (LENGTH, 77)]
    assert shapes[0] == shapes[1]


def test_untrained_it_is_the_model_without_time():
    items, gaps = histories()
    timed, timeless = (
        nnx.split(
            build(
                CAUSAL | {"is_time": on, "num_layers": 1}, n_items=ITEMS, max_length=LENGTH, seed=3
            )
        )
        for on in (True, False)
    )
    np.testing.assert_allclose(call(*timed, items, gaps), call(*timeless, items, gaps), atol=1e-6)


def test_only_the_last_weights_of_a_layer_begin_smaller():
    models = [
        build(
            CAUSAL | {"output_std": std, "num_layers": 1}, n_items=ITEMS, max_length=LENGTH, seed=1
        )
        for std in (0.02, 0.002)
    ]
    for (path, large), (_, small) in zip(
        *(nnx.to_flat_state(nnx.state(model)) for model in models), strict=True
    ):
        ratio = 0.1 if path[-2:] == ("out_proj", "kernel") else 1.0
        np.testing.assert_allclose(small[...], ratio * large[...], rtol=1e-6)


def test_gap_features_interpolate():
    gaps = jnp.array([-5.0, 0.0, 0.5, 60.0, 86_400.0, 3e8, 1e12, jnp.inf])
    features = np.asarray(gap_features(gaps))
    assert features.shape == (8, KNOTS)
    np.testing.assert_allclose(features.sum(1), 1, atol=1e-6)
    assert ((features > 0).sum(1) <= 2).all()
    assert features[0, 0] == features[1, 0] == 1
    np.testing.assert_array_equal(features[-2], features[-1])
    means = features @ np.arange(KNOTS)
    assert (np.diff(means[1:6]) > 0.2).all()


def test_huge_and_zero_gaps_stay_finite_with_their_gradients():
    graph, params = make(num_layers=1)
    items, gaps = histories()
    gaps[:, 3], gaps[:, 4] = 1e18, 0

    def loss(params):
        lengths = jnp.full(ROWS, LENGTH)
        return (
            nnx.merge(graph, params)(jax.device_put(items), lengths, jax.device_put(gaps)) ** 2
        ).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    kernel = nnx.to_pure_dict(gradients)["blocks"][0]["modulator"]["kernel"]
    assert np.abs(kernel).sum() > 0


def test_knowing_the_next_time_must_be_asked_for():
    graph, params = make()
    model = nnx.merge(graph, params)
    with pytest.raises(ValueError, match="does not know"):
        model.at(jnp.zeros((2, 16)), jnp.zeros(2))
    hidden = np.random.default_rng(0).standard_normal((2, 16), np.float32)

    @jit
    def soon_and_late(graph, params, hidden):
        knowing = nnx.merge(graph, params)
        return [knowing.at(hidden, jnp.full(2, wait)) for wait in (10.0, 1e6)]

    soon, late = map(np.asarray, soon_and_late(*make(knows_next_time=True), hidden))
    assert np.abs(soon - late).max() > 1e-2


def test_bfloat16_is_close():
    items, gaps = histories()
    exact = np.asarray(call(*make(num_layers=1), items, gaps))
    rough = np.asarray(call(*make(num_layers=1, dtype="bfloat16"), items, gaps), np.float32)
    assert np.sqrt(np.mean((rough - exact) ** 2) / np.mean(exact**2)) < 3e-2
