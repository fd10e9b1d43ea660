"""Every dropout rate of every model acts where dropout is on."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small_models import jit, small_model
from tim4rec_jax.models import MODELS

ITEMS, LENGTH = 12, 6
SMALL = dict(hidden_size=8, inner_size=16, n_layers=1, num_layers=1, n_heads=2, head_dim=8)
SMALL |= dict(embedding_size=8, d_state=4, time_span=8, time_buckets=8, n_h=2, n_v=2)
ENCODINGS = ("paper", "causal")  # of TiM4Rec


def names(model):
    """The settings of a model."""
    return [field.name for field in dataclasses.fields(MODELS[model].Settings)]


def rates(model):
    """Those that are dropout rates."""
    return [name for name in names(model) if "drop" in name and name != "id_dropout"]


CASES = [
    (name, rate, encoding)
    for name in MODELS
    for rate in rates(name)
    for encoding in (ENCODINGS if name == "tim4rec" else ("",))
    if (rate, encoding) != ("time_drop_out", "causal")  # it has no time stream
]


@jit
def encode(graph, params, items, lengths, gaps, seeds):
    return nnx.merge(graph, params).encode(items, lengths, gaps, dropout_seeds=seeds)


@pytest.mark.parametrize(("name", "rate", "encoding"), CASES)
def test_other_seeds_drop_other_numbers(name, rate, encoding):
    settings = {key: value for key, value in SMALL.items() if key in names(name)}
    settings |= dict.fromkeys(rates(name), 0.0) | {"name": name, rate: 0.5}
    if encoding:
        settings["time_encoding"] = encoding
    model = small_model(settings, spread=0.3, n_items=ITEMS, max_length=LENGTH)
    rng = np.random.default_rng(0)
    items = jnp.asarray(rng.integers(1, ITEMS + 1, (2, LENGTH)), jnp.int32)
    gaps = jnp.asarray(rng.integers(1, 90, (2, LENGTH)), jnp.float32)
    seeds = jnp.arange(2, dtype=jnp.uint32)
    one, two = (
        np.asarray(encode(*model, items, jnp.full(2, LENGTH), gaps, seeds + more))
        for more in (1, 9)
    )
    assert np.isfinite(one).all() and np.abs(one - two).max() > 1e-4
