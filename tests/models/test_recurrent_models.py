"""Models that are a recurrence: no future, no other history, the same event by event."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tests.models.small_models import jit, small_model
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.models import MODELS, build
from tim4rec_jax.training.objectives import every_position_loss, prefix_loss

ITEMS, LENGTH, ROWS = 30, 12, 3
SMALL = dict(hidden_size=16, embedding_size=8, d_state=4, head_dim=8)
models = pytest.mark.parametrize("name", ["gru4rec", "lrurec", "mamba4rec", "ssd4rec"])


@functools.cache
def make(name):
    settings = {key: v for key, v in SMALL.items() if hasattr(MODELS[name].Settings, key)}
    sizes = dict(n_items=ITEMS, max_length=LENGTH)
    return small_model({"name": name, **settings}, spread=0.3, **sizes)


def histories():
    return np.random.default_rng(0).integers(1, ITEMS + 1, (ROWS, LENGTH), dtype=np.int32)


LENGTHS = np.array([1, 12, 7], np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class States:
    whole: jax.Array  # [B,L,D], each row one history
    packed: jax.Array  # [B,L,D], each segment one history
    encoded: jax.Array  # [B,D], at LENGTHS
    stepped: jax.Array  # [B,L,D], event by event


@jit
def compute(graph, params, items, segment_ids):
    """All that the tests compare, in one program for each model."""
    model, gaps = nnx.merge(graph, params), jnp.zeros(items.shape)
    full = jnp.full(items.shape[0], items.shape[1])

    def step(state, now):
        return model.step(state, now, jnp.zeros(now.shape))

    _, stepped = jax.lax.scan(step, model.init_state(len(items)), items.T)
    return States(
        whole=model(items, full, gaps),
        packed=model(items, full, gaps, segment_ids=segment_ids),
        encoded=model.encode(items, jax.device_put(LENGTHS), gaps),
        stepped=stepped.swapaxes(0, 1),
    )


def states(model, items, segment_ids=None):
    ids = np.zeros(items.shape, np.int32) if segment_ids is None else segment_ids
    return jax.tree.map(np.asarray, compute(*model, items, ids))


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5)


@models
def test_sees_no_future_and_all_of_the_past(name):
    model, items = make(name), histories()
    whole = states(model, items).whole
    others = items.copy()
    others[:, 7] = others[:, 7] % ITEMS + 1
    moved = np.abs(states(model, others).whole - whole).max(axis=(0, 2))
    assert (moved[:7] == 0).all()
    assert (moved[7:10] > 1e-4).all()


@models
def test_segments_are_rows_of_their_own(name):
    model, items = make(name), histories()
    ids = np.sort(np.random.default_rng(1).integers(0, 4, items.shape, np.int32), axis=1)
    together = states(model, items, ids).packed
    for row, segments in enumerate(ids):
        for segment in np.unique(segments):
            own = segments == segment
            alone = np.zeros((ROWS, LENGTH), np.int32)
            alone[0, : own.sum()] = items[row, own]
            close(together[row, own], states(model, alone).whole[0, : own.sum()])


@models
def test_one_position_and_steps_are_what_the_whole_row_gives(name):
    model, items = make(name), histories()
    found = states(model, items)
    close(found.encoded, found.whole[np.arange(ROWS), LENGTHS - 1])
    close(found.stepped, found.whole)


# The tests above say the same of the states of every model.
@pytest.mark.parametrize(
    "name",
    [
        "gru4rec",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("lrurec", "mamba4rec", "ssd4rec")
        ),
    ],
)
def test_every_position_of_packed_rows_is_every_prefix(name):
    dataset = in_memory(random_histories([9, 4, 7]))
    graph, params = make(name)
    prefixes = TrainBatches(
        dataset, max_length=12, batch_size=11, seed=0, convention="exact", buckets=[12]
    )
    # One batch whose only row holds all three histories uncut.
    rows = PackedBatches(dataset, max_length=12, batch_size=1, seed=0)
    assert prefixes.batches_per_epoch == rows.batches_per_epoch == 1
    losses = [
        jit(lambda graph, params, batch, loss=loss: loss(nnx.merge(graph, params), batch, None))(
            graph, params, {key: value for key, value in batch.items() if key != "users"}
        )
        for loss, batch in ((prefix_loss, prefixes[0]), (every_position_loss, rows[0]))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "tim4rec", "time_encoding": "causal"},
        {"name": "tim4rec", "time_encoding": "masked"},
        {"name": "mamba4rec"},
        {"name": "ssd4rec"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_a_single_layer_has_a_residual_connection_only_where_it_is_asked_for(settings):
    """Where the layer gives nothing, only that connection tells one item from another."""
    small = {"hidden_size": 16, "d_state": 4, "head_dim": 8, "num_layers": 1} | settings
    if settings["name"] == "mamba4rec":
        del small["head_dim"]
    for asked in (True, False):
        model = build(small | {"single_layer_residual": asked}, n_items=ITEMS, max_length=4, seed=0)
        [block] = model.blocks
        out = (block.mamba if settings["name"] == "mamba4rec" else block.ssd).out_proj
        out.kernel[...] = jnp.zeros_like(out.kernel[...])
        hidden = model.encode(jnp.array([[1], [2]]), jnp.ones(2, jnp.int32), jnp.zeros((2, 4)))
        assert asked == (float(jnp.abs(hidden[0] - hidden[1]).max()) > 1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "tim4rec", "time_encoding": "causal"},
        {"name": "tim4rec", "time_encoding": "paper"},
        {"name": "ssd4rec"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_with_a_large_epsilon_a_weak_signal_stays_weak(settings):
    """Weights of z that are a tenth give about a tenth, which the usual norm hides."""
    small = {"hidden_size": 16, "d_state": 4, "head_dim": 8, "num_layers": 1} | settings
    shares = []
    for eps in (0.0, 1.0):
        model = build(small | {"ssd_norm_eps": eps}, n_items=ITEMS, max_length=4, seed=0)
        layer, h = model.blocks[0].ssd, jax.random.normal(jax.random.key(0), (2, 4, 16))
        strong = layer(h)
        kernel = layer.in_proj.kernel[...]
        layer.in_proj.kernel[...] = kernel.at[:, : layer.inner].multiply(0.1)
        shares.append(float(jnp.linalg.norm(layer(h)) / jnp.linalg.norm(strong)))
    assert shares[0] > 0.8 and shares[1] < 0.2
