"""Initial weights have the statistics of the reference's (pooled over 8 seeds there)."""

import json
import math

import numpy as np
import pytest

from tim4rec_jax.interop import to_torch
from tim4rec_jax.models import build

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
