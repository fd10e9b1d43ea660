"""Initial weights of the comparison models have the statistics of the published code's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from tim4rec_jax.interop import to_torch
from tim4rec_jax.interop.formats import FORMATS
from tim4rec_jax.interop.weights import model_config
from tim4rec_jax.models import build

STATISTICS = json.loads(
    (Path(__file__).parents[1] / "golden/baselines/init_stats.json").read_text()
)
SEEDS = 2


def real_parts(weights):
    """Complex parameters as the two that they are."""
    for name, value in weights.items():
        if np.iscomplexobj(value):
            yield f"{name}#re", value.real
            yield f"{name}#im", value.imag
        else:
            yield name, value


@pytest.mark.parametrize("name", [name for name in STATISTICS if name in FORMATS])
def test_shapes_means_and_deviations(name):
    config, expected = STATISTICS[name]["config"] | {"model": name}, STATISTICS[name]["params"]
    settings, max_length = model_config(config)
    sizes = dict(n_items=config["n_items"] - 1, n_users=config["n_users"] - 1)
    models = [
        dict(real_parts(to_torch(build(settings, max_length=max_length, seed=seed, **sizes))))
        for seed in range(SEEDS)
    ]
    assert models[0].keys() == expected.keys()
    for parameter, figures in expected.items():
        value = np.stack([model[parameter] for model in models])
        assert list(value.shape[1:]) == figures["shape"], parameter
        mean, std = figures["mean"], figures["std"]
        if std == 0:
            np.testing.assert_allclose(value, mean, atol=1e-4, err_msg=parameter)
            continue
        error = 4.5 / math.sqrt(value[0].size) * math.sqrt(1 / SEEDS + 1 / 8)
        assert abs(value.mean() - mean) < error * std, parameter
        assert abs(value.std() / std - 1) < error, parameter
        # Normal, cut normal and uniform values differ in how far they reach.
        if value[0].size >= 1024:
            farthest = max(-figures["min"], figures["max"])
            assert 0.7 < np.abs(value).max() / farthest < 1.4, parameter
        fixed = parameter.endswith("mamba.A_log")  # the same numbers for every seed
        assert np.array_equal(value[0], value[1]) == fixed, parameter
