"""Initial weights have the statistics of the reference's (pooled over 8 seeds there)."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.interop import to_torch
from tim4rec_jax.models import build, encode_batch

SEEDS = 8
SETTINGS = {
    "name": "tim4rec",
    "time_encoding": "paper",
    "dtype": "float32",
    "num_layers": 2,
    "dropout_prob": 0.2,
    "time_drop_out": 0.2,
    "d_conv": 4,
    "expand": 2,
    "chunk_size": 32,
    "is_ffn": True,
}
# Kaiming-normal convolutions and one gate a row; uniform ones and a gate per position; no time.
MODELS = {
    "ml1m_64d": dict(
        hidden_size=64,
        d_state=32,
        head_dim=32,
        norm_eps=1e-12,
        is_time=True,
        p2p_residual=False,
        is_kai_ming_init=True,
        max_length=200,
    ),
    "beauty_64d": dict(
        hidden_size=64,
        d_state=32,
        head_dim=32,
        norm_eps=1e-5,
        is_time=True,
        p2p_residual=True,
        is_kai_ming_init=False,
        max_length=50,
    ),
    "movie_256d": dict(
        hidden_size=256,
        d_state=64,
        head_dim=128,
        norm_eps=1e-12,
        is_time=False,
        p2p_residual=False,
        is_kai_ming_init=True,
        max_length=200,
    ),
}
ITEMS = 300  # enough for statistics; the reference's numbers of items need more time


def inverse_softplus(x):
    return math.log(math.expm1(x))


RANGES = {
    "A_log": (0, math.log(16)),
    "dt_bias": (inverse_softplus(1e-3), inverse_softplus(1e-1)),
}


@pytest.fixture(scope="module", params=MODELS)
def statistics_and_weights(request):
    settings = dict(MODELS[request.param])
    max_length = settings.pop("max_length")
    models = [
        to_torch(build(SETTINGS | settings, n_items=ITEMS, max_length=max_length, seed=seed))
        for seed in range(SEEDS)
    ]
    weights = {name: np.stack([model[name] for model in models]) for name in models[0]}
    return request.param, weights


def test_names_shapes_and_number_of_parameters(golden, statistics_and_weights):
    name, weights = statistics_and_weights
    reference = json.loads((golden / "init_stats.json").read_text())
    rows, width = reference[name]["item_embedding.weight"]["shape"]
    shapes = {parameter: list(value.shape[1:]) for parameter, value in weights.items()}
    assert shapes["item_embedding.weight"] == [ITEMS + 1, width]
    expected = {parameter: figures["shape"] for parameter, figures in reference[name].items()}
    assert shapes | {"item_embedding.weight": [rows, width]} == expected
    count = sum(math.prod(shape) for shape in shapes.values()) + (rows - ITEMS - 1) * width
    assert count == reference[f"{name}/n_params"]


def test_means_and_deviations(golden, statistics_and_weights):
    name, weights = statistics_and_weights
    reference = json.loads((golden / "init_stats.json").read_text())[name]
    for parameter, value in weights.items():
        mean, std = reference[parameter]["mean"], reference[parameter]["std"]
        if std == 0:
            assert np.all(value == mean), parameter
            continue
        # Both are estimates, the reference's from as many or more values.
        error = math.sqrt(2 / value.size)
        assert abs(value.mean() - mean) < 4.5 * error * std, parameter
        assert abs(value.std() / std - 1) < 4.5 * error / math.sqrt(2), parameter


def test_ranges(statistics_and_weights):
    name, weights = statistics_and_weights
    uniform = not MODELS[name]["is_kai_ming_init"]
    for parameter, value in weights.items():
        bounds = RANGES.get(parameter.split(".")[-1])
        if "conv1d" in parameter and uniform:
            bounds = (-0.5, 0.5)
        if bounds:
            assert bounds[0] - 1e-5 <= value.min() < value.max() <= bounds[1] + 1e-5, parameter


def test_the_padding_row_is_initialised_like_the_others(statistics_and_weights):
    _, weights = statistics_and_weights
    padding = weights["item_embedding.weight"][:, 0]
    assert abs(padding.std() / 0.02 - 1) < 4.5 / math.sqrt(2 * padding.size)


def test_no_two_parameters_share_their_random_numbers(statistics_and_weights):
    _, weights = statistics_and_weights
    # The first few values of each random parameter, in units of the parameter's deviation.
    heads = {n: v[0].ravel()[:4] / v.std() for n, v in weights.items() if v.std() > 0}
    values = np.stack([head for head in heads.values() if len(head) == 4])
    distances = np.abs(values[:, None] - values[None]).max(-1)
    assert np.all(distances[~np.eye(len(values), dtype=bool)] > 1e-3)
    assert not np.array_equal(*weights["ssd_layers.0.ssd.out_proj.weight"][:2])  # nor two seeds


def test_comparison_models_begin_as_their_authors_have_them():
    sizes = dict(n_items=40, max_length=50)
    hstu = build({"name": "hstu"}, **sizes)
    bias = np.concatenate([layer.out.bias[...] for layer in hstu.layers])
    assert np.abs(bias).max() <= 1 / 8 and np.std(bias) == pytest.approx(1 / 8 / 3**0.5, rel=0.2)
    # 3,200 numbers: the standard deviation of a standard deviation is 1.3 %.
    std = np.std(hstu.position_embedding.embedding[...])
    assert std == pytest.approx((2 / (50 + 64)) ** 0.5, rel=0.06)
    esasrec = build({"name": "esasrec"}, **sizes)
    for layer in esasrec.layers:
        for part in (layer.attention.query, layer.attention.key, layer.attention.value):
            assert np.std(part.kernel[...]) == pytest.approx((2 / 256) ** 0.5, rel=0.05)
        assert np.std(layer.attention.out.kernel[...]) == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    bsarec = build({"name": "bsarec"}, **sizes)
    first, *others = (np.asarray(layer.beta[...]) for layer in bsarec.layers)
    assert others and all((first == other).all() for other in others)


def test_what_is_added_to_scores_begins_at_zero():
    extras = {"repeat_bias": True, "repeat_last": True, "date_bias_knots": 3}
    model = build(
        {"name": "lrurec", "hidden_size": 8, "n_layers": 1, **extras},
        n_items=40,
        max_length=5,
        date_range=(10**8, 10**9),
    )
    assert float(model.repeat_bias()) == 0
    assert not np.asarray(model.last_bias()).any() and not np.asarray(model.drift.vectors).any()
    # A state has a 1 behind its 8 numbers, and the date moves those alone.
    model.drift.vectors[...] = np.ones_like(model.drift.vectors)
    batch = {"items": np.ones((1, 5), np.int32), "lengths": np.array([5], np.int32)}
    batch |= {"gaps": np.zeros((1, 5), np.float32), "dates": np.array([2000.0], np.float32)}
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    moved = np.asarray(encode_batch(model, batch))
    model.drift.vectors[...] = np.zeros_like(model.drift.vectors)
    moved = moved - np.asarray(encode_batch(model, batch))
    assert (moved[0, :8] != 0).all() and moved[0, 8] == 0
