"""The two models that are no sequence of layers: an image of the history, and none of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.small_models import jit, small_model
from tim4rec_jax import config as config_lib
from tim4rec_jax.models import build, encode_batch

ITEMS, USERS, LENGTH = 20, 5, 9


@functools.cache
def caser(param_dtype):
    settings = {"name": "caser", "embedding_size": 8, "nh": 24}
    sizes = dict(n_items=ITEMS, n_users=USERS, max_length=LENGTH)
    return small_model(settings, spread=0.3, **sizes, param_dtype=param_dtype)


@jit
def encode(graph, params, batch):
    return encode_batch(nnx.merge(graph, params), batch)


@jit
def encode_alone(graph, params, *arrays):
    return nnx.merge(graph, params).encode(*arrays)


def batch(items, users=(0, 1)):
    items = np.asarray(items, np.int32)
    gaps, lengths = np.zeros((2, LENGTH), np.float32), (items > 0).sum(1).astype(np.int32)
    return {"items": items, "lengths": lengths, "gaps": gaps, "users": np.asarray(users, np.int32)}


ROWS = np.array([[3, 1, 4, 0, 0, 0, 0, 0, 0], [1, 5, 9, 2, 0, 0, 0, 0, 0]])


def test_caser_by_its_definition(x64):
    graph, params = caser(jnp.float64)
    model = nnx.merge(graph, params)
    table, users = (e.embedding[...] for e in (model.item_embedding, model.user_embedding))
    image = np.asarray(table[ROWS])  # with the vector of padding
    seen = []
    for kernel, bias in zip(model.vertical.kernel[...].T, model.vertical.bias[...], strict=True):
        seen.append(np.einsum("bld,l->bd", image, kernel) + bias)
    for height, windows in enumerate(model.windows, start=1):
        starts = range(LENGTH - height + 1)
        all_windows = np.stack([image[:, s : s + height] for s in starts], axis=1)
        response = np.einsum("bphd,hdk->bpk", all_windows, windows.kernel[...])
        seen.append(np.maximum(response + windows.bias[...], 0).max(1))
    h = np.maximum(model.fc1(jnp.concatenate(seen, 1)), 0)
    expected = np.maximum(model.fc2(jnp.concatenate([h, users[jnp.array([1, 2])]], 1)), 0)
    np.testing.assert_allclose(encode(graph, params, batch(ROWS)), expected, rtol=1e-12)


def test_caser_in_a_shorter_bucket_is_the_same(x64):
    whole, short = (encode(*caser(jnp.float64), batch(rows)) for rows in (ROWS, ROWS[:, :5]))
    np.testing.assert_allclose(whole, short, rtol=1e-12)


def test_caser_sees_the_user_and_takes_unknown_ones(x64):
    model = caser(jnp.float64)
    known, other = (encode(*model, batch(ROWS, users)) for users in ((0, 1), (3, 1)))
    assert np.abs(known[0] - other[0]).max() > 1e-4
    np.testing.assert_array_equal(known[1], other[1])
    unknown = encode(*model, batch(ROWS, (-1, -1)))
    without = encode_alone(*model, *(batch(ROWS)[key] for key in ("items", "lengths", "gaps")))
    np.testing.assert_allclose(unknown, without, rtol=1e-12)


def test_the_penalty_of_caser_is_of_all_weights_but_biases():
    model = nnx.merge(*caser(jnp.float32))
    state = nnx.to_pure_dict(nnx.state(model))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    norms = [np.linalg.norm(leaf) for path, leaf in leaves if path[-1].key != "bias"]
    assert len(norms) == 2 + 3 + LENGTH  # tables, dense and vertical kernels, and one per height
    assert float(model.penalty()) == pytest.approx(1e-4 * sum(norms), rel=1e-5)


def test_caser_has_no_state_for_every_position():
    rows = batch(ROWS)
    arguments = [jax.device_put(rows[key]) for key in ("items", "lengths", "gaps")]
    with pytest.raises(ValueError, match="one state a history"):
        nnx.merge(*caser(jnp.float32))(*arguments)


def test_popularity_ranks_by_counts_and_learns_nothing():
    config = config_lib.default()
    config_lib.use_model(config, "popularity")
    config = config_lib.resolve(config)
    assert config.train.epochs == 1
    counts = np.array([7, 0, 2**24 - 1])
    model = build(config.model, n_items=3, max_length=LENGTH, item_counts=counts)
    rows = batch(ROWS)
    arguments = [jax.device_put(rows[key]) for key in ("items", "lengths", "gaps")]
    expected = np.tile([0, 7, 0, 2**24 - 1], (2, 1))
    _, streamed = model.step(model.init_state(2), arguments[0][:, 0], jnp.zeros(2))
    for hidden in (model.encode(*arguments), model(*arguments)[:, -1], streamed):
        np.testing.assert_array_equal(hidden @ model.item_table().T, expected)
    graph, params = nnx.split(model)
    gradient = jax.grad(lambda params: nnx.merge(graph, params).item_table().sum())(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
