"""On any mesh of devices, loss and gradients are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tests.training.tiny_run import MAX_LENGTH, MODEL, LastItem, tiny_config
from tim4rec_jax import config as config_lib
from tim4rec_jax import item_rows
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.models import build
from tim4rec_jax.models.base import DataSizes, ModelSettings
from tim4rec_jax.runtime import make_mesh
from tim4rec_jax.training import sharded_gradients, sharded_loss, step
from tim4rec_jax.training.losses import Loss
from tim4rec_jax.training.negatives import item_frequencies
from tim4rec_jax.training.objectives import OBJECTIVES
from tim4rec_jax.training.row_optimizers import ByRow

slow = pytest.mark.slow
ROWS, N_ITEMS = 16, 30
MESHES = [(1, 8), (2, 4), (8, 1)]


def with_bias(n_items=N_ITEMS):
    sizes, wide = DataSizes(n_items, MAX_LENGTH), jnp.float64
    return LastItem(ModelSettings(repeat_bias=True), sizes, rngs=nnx.Rngs(0), param_dtype=wide)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def batch_of(objective):
    dataset = in_memory(random_histories([20] * 6, n_items=N_ITEMS))
    settings = dict(max_length=MAX_LENGTH, batch_size=ROWS, seed=0)
    if objective == "every_position":
        batch = PackedBatches(dataset, **settings)[0]
    else:
        batch = TrainBatches(dataset, **settings, convention="exact", buckets=[MAX_LENGTH])[0]
    return jax.device_put(wide({k: jnp.asarray(v) for k, v in batch.items()}))


def both(model, objective, loss, shape, microbatches=1, by_row=False):
    """Loss and gradients of one device, and those of a mesh without what completes tables."""
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)
    batch = batch_of(objective)
    key, seeds = jax.random.key(3), row_seeds(jax.random.key(4), ROWS)
    frequencies = jax.device_put(item_frequencies(np.arange(N_ITEMS) % 7))

    @jax.jit
    def plain(params, batch):
        whole: nnx.State = nnx.merge_state(params, fixed)
        prepared = OBJECTIVES[objective].prepare(nnx.merge(graphdef, whole), batch, key)
        function = loss.prepare(key, N_ITEMS, frequencies)
        return step.loss_and_gradients(graphdef, whole, prepared, seeds, 1, objective, function)

    mesh, names = make_mesh(*shape, jax.devices()), model.item_rows
    dense, tables = item_rows.split(params, names)
    rows = item_rows.padded(N_ITEMS + type(model).special_rows, mesh.size)
    filled = {
        name: jnp.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=9.0)
        for name, x in tables.items()
    }

    @jax.jit
    def sharded(params, batch, frequencies):
        prepared = OBJECTIVES[objective].prepare(nnx.merge(graphdef, params, fixed), batch, key)
        return sharded_gradients.loss_and_gradients(
            graphdef,
            params,
            fixed,
            prepared,
            seeds,
            by_row=ByRow(mesh, names, "adagrad" if by_row else None),
            microbatches=microbatches,
            objective=objective,
            loss=loss,
            key=key,
            frequencies=frequencies if loss.name == "sampled_softmax" else None,
        )

    value, gradients = plain(params, batch)
    ours = sharded(item_rows.join(dense, filled), batch, frequencies)
    d_dense, d_tables = item_rows.split(ours[1], names)
    if by_row:
        places = np.asarray(ours[2].places).reshape(mesh.size, -1)
        own = rows // mesh.size
        for name, x in ours[2].tables.items():
            x = np.asarray(x).reshape(*places.shape, *x.shape[1:])
            d_tables[name] = np.zeros((rows, *x.shape[2:]))
            for device, (at, found) in enumerate(zip(places, x, strict=True)):
                real = at < own
                assert (np.diff(at[real]) > 0).all()
                d_tables[name][device * own + at[real]] = found[real]
    else:
        for name, table in d_tables.items():
            assert len({s.device for s in table.addressable_shards}) == mesh.size, name
    for name, table in d_tables.items():
        assert not np.any(table[len(tables[name]) :])
    d_tables = {name: x[: len(tables[name])] for name, x in d_tables.items()}
    return (value, gradients), (ours[0], item_rows.join(d_dense, d_tables))


def check(plain, ours):
    """In float64, where only the order of sums differs."""
    np.testing.assert_allclose(ours[0], plain[0], rtol=1e-12)
    pairs = list(zip(jax.tree.leaves(ours[1]), jax.tree.leaves(plain[1]), strict=True))
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
    assert max(np.abs(expected).max() for _, expected in pairs) > 1e-3


@pytest.mark.parametrize("shape", MESHES)
def test_cross_entropy_over_the_items_of_all_devices(shape, x64, monkeypatch):
    """With the repeat bias, in two blocks of rows."""
    monkeypatch.setattr(sharded_loss, "few_scores", lambda rows, items: False)
    monkeypatch.setattr(sharded_loss, "block_rows", lambda items: 8)
    check(*both(with_bias(), "every_position", Loss(), shape))


@pytest.mark.parametrize(
    ("name", "objective", "shape", "microbatches", "by_row"),
    [
        ("sampled_softmax", "prefix", (2, 4), 2, True),
        ("bpr", "every_position", (1, 1), 1, True),
        pytest.param("gbce", "prefix", (8, 1), 1, False, marks=slow),
        pytest.param("sampled_softmax", "every_position", (1, 8), 2, False, marks=slow),
        pytest.param("gbce", "every_position", (4, 2), 2, True, marks=slow),
    ],
)
def test_sampled_losses(name, objective, shape, microbatches, by_row, x64):
    """With the repeat bias; gradients of whole tables and of rows."""
    check(*both(with_bias(), objective, Loss(name, 12), shape, microbatches, by_row))


def test_a_loss_of_ones_own_is_refused(x64):
    """The cross-entropy would take its place in silence."""
    graphdef, params, fixed = nnx.split(with_bias(), nnx.Param, ...)
    with pytest.raises(ValueError, match="'os:path' needs the whole item table"):
        sharded_gradients.loss_and_gradients(
            graphdef,
            params,
            fixed,
            batch_of("prefix"),
            row_seeds(jax.random.key(4), ROWS),
            by_row=ByRow(make_mesh(1, 1, jax.devices()), type(with_bias()).item_rows, None),
            microbatches=1,
            objective="prefix",
            loss=Loss("os:path"),
            key=jax.random.key(3),
            frequencies=None,
        )


@slow
@pytest.mark.parametrize("name", ["bert4rec", "hstu", "lrurec", "sasrec", "tim4rec"])
@pytest.mark.parametrize("loss", ["cross_entropy", "sampled_softmax"])
def test_every_model(name, loss, x64):
    """Models with a bias for each item, a mask, vectors of length 1, and plain ones."""
    config = tiny_config("none")
    config_lib.use_model(config, name)
    config.model.update({key: value for key, value in MODEL.items() if key in config.model})
    objective = config.train.objective
    model = build(config.model, n_items=N_ITEMS, max_length=MAX_LENGTH, param_dtype=jnp.float64)
    check(*both(model, objective, Loss(loss, 12), (2, 4), by_row=loss != "cross_entropy"))
