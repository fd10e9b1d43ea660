"""What features add to the vectors of items, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tim4rec_jax.layers.items import EXCLUDED, FeatureArrays, ItemEmbedding

N_ITEMS, WIDTH = 5, 4
# Item 2 has two values, item 3 none, and item 5 no training events.
FEATURES = FeatureArrays(
    codes=np.array([[0, 0], [2, 0], [2, 3], [1, 0], [3, 0], [3, 0]], np.int32),
    weights=np.array([[0, 0], [1, 0], [0.5, 0.5], [1, 0], [1, 0], [1, 0]], np.float32),
    dense=np.array([[0], [1], [-1], [0], [2], [-2]], np.float32),
    counts=np.array([1, 3, 2, 9, 1, 0]),
    values=4,
)


def make(features=FEATURES):
    """Two rows more than items: padding, and a mask token."""
    table = ItemEmbedding(
        N_ITEMS + 2,
        WIDTH,
        features=features,
        dropout_rate=0.5,
        embedding_init=nnx.initializers.ones,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    rng = np.random.default_rng(1)
    maps = table.maps
    parts = (table.embedding, maps.values, maps.kernel, maps.bias)
    for param in (part for part in parts if part is not None):
        param[...] = jnp.asarray(rng.normal(size=param.shape), jnp.float32)
    table.clear_untrained()
    return table


def expected(table):
    """The vectors, one item after the other."""
    rows, maps = np.array(table.embedding[...]), table.maps
    rows[N_ITEMS] = 0  # item 5 stands on its features alone
    for item in range(1, N_ITEMS + 1):
        if maps.values is not None:
            for code, weight in zip(FEATURES.codes[item], FEATURES.weights[item], strict=True):
                rows[item] += weight * np.asarray(maps.values[code])
        if maps.kernel is not None:
            rows[item] += FEATURES.dense[item] @ np.asarray(maps.kernel[...])
        rows[item] += np.asarray(maps.bias[...])
    return rows


def test_vectors_are_rows_and_maps():
    table = make()
    np.testing.assert_allclose(table.vectors(), expected(table), rtol=1e-5, atol=1e-6)
    items = jnp.array([[0, 5, 2], [6, 1, 3]])
    np.testing.assert_allclose(table(items), expected(table)[items], rtol=1e-5, atol=1e-6)


def test_folded_vectors_are_the_same_and_need_no_maps():
    table = make()
    before = np.asarray(table.vectors())
    table.fold()
    assert table.maps is None and set(nnx.state(table)) == {"embedding"}
    np.testing.assert_array_equal(table.vectors(), before)
    np.testing.assert_array_equal(table(jnp.arange(N_ITEMS + 2)), before)


def test_new_maps_add_nothing_but_a_common_bias():
    table = ItemEmbedding(
        N_ITEMS + 1,
        WIDTH,
        features=FEATURES,
        embedding_init=nnx.initializers.ones,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    bias = np.asarray(table.maps.bias[...])
    np.testing.assert_allclose(table.vectors()[1:5], 1 + np.tile(bias, (4, 1)), rtol=1e-6)
    np.testing.assert_allclose(table.vectors()[5], bias, rtol=1e-6)
    assert np.asarray(table.maps.excluded[...]).tolist() == [0] * 5 + [EXCLUDED]


@pytest.mark.parametrize(
    ("empty", "held"),
    [(["dense"], {"values", "codes", "weights"}), (["codes", "weights"], {"kernel", "dense"})],
)
def test_one_kind_of_feature_alone_leaves_no_empty_array(empty, held):
    """An array without elements cannot be saved."""
    none = {name: np.zeros((N_ITEMS + 1, 0), getattr(FEATURES, name).dtype) for name in empty}
    table = make(FEATURES._replace(**none))
    state = nnx.to_pure_dict(nnx.state(table.maps))
    assert set(state) == held | {"bias", "excluded"} and all(leaf.size for leaf in state.values())
    np.testing.assert_allclose(table.vectors(), expected(table), rtol=1e-5, atol=1e-6)


def test_gradients_reach_rows_and_maps():
    table = make()
    graph, params, fixed = nnx.split(table, nnx.Param, ...)
    weight = np.zeros((N_ITEMS + 2, WIDTH), np.float32)
    weight[2] = [1, 2, 3, 4]

    def loss(params):
        return jnp.sum(nnx.merge(graph, params, fixed).vectors() * weight)

    found = nnx.to_pure_dict(jax.grad(loss)(params))
    np.testing.assert_array_equal(found["embedding"], weight)
    maps = found["maps"]
    values = np.zeros((4, WIDTH))
    values[2] = values[3] = 0.5 * weight[2]
    np.testing.assert_allclose(maps["values"], values, rtol=1e-6)
    np.testing.assert_allclose(maps["kernel"], -weight[2:3], rtol=1e-6)
    np.testing.assert_allclose(maps["bias"], weight[2], rtol=1e-6)


def test_rows_are_left_out_for_items_only():
    table = make()
    before = np.asarray(table.embedding[...])
    left = np.zeros(N_ITEMS + 2, int)
    for seed in range(20):
        table.embedding[...] = jnp.asarray(before)
        table.drop_rows(jax.random.key(seed))
        after = np.asarray(table.embedding[...])
        dropped = (after == 0).all(axis=1) & (before != 0).any(axis=1)
        np.testing.assert_array_equal(after[~dropped], before[~dropped])
        left += dropped
    assert left[0] == left[N_ITEMS + 1] == 0  # padding and the mask token
    assert (left[1:N_ITEMS] > 3).all() and (left[1:N_ITEMS] < 17).all()


def test_a_table_without_features_is_an_embedding():
    make = dict(embedding_init=nnx.initializers.normal(1.0), dtype=jnp.bfloat16)
    make |= dict(param_dtype=jnp.float32)
    ours = ItemEmbedding(3, 2, rngs=nnx.Rngs(3), **make)
    theirs = nnx.Embed(3, 2, rngs=nnx.Rngs(3), **make)
    assert set(nnx.state(ours)) == {"embedding"}
    np.testing.assert_array_equal(ours(jnp.arange(3)), theirs(jnp.arange(3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_vectors_are_rounded_once(dtype):
    table = make()
    table.dtype = dtype
    assert table(jnp.arange(3)).dtype == dtype
    np.testing.assert_array_equal(table(jnp.arange(7)), table.vectors().astype(dtype))
