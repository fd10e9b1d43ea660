"""Activations in bfloat16: comparison models compute nearly the same, with float32 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax.layers.items import ItemEmbedding
from tim4rec_jax.models import DEFAULT_MODEL, MODELS, build
from tim4rec_jax.models.tisasrec import TimeRelation

ITEMS, LENGTH = 30, 10
LENGTHS = jnp.array([10, 3, 1])


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in (DEFAULT_MODEL, "popularity")]
)
def test_states_are_those_of_float32(name):
    rng = np.random.default_rng(0)
    items = rng.integers(1, ITEMS + 1, (3, LENGTH))
    items = jnp.asarray(np.where(np.arange(LENGTH) < LENGTHS[:, None], items, 0), jnp.int32)
    gaps = jnp.asarray(rng.uniform(0, 1e5, (3, LENGTH)), jnp.float32)

    states = []
    for dtype in ("float32", "bfloat16"):
        config = config_lib.default()
        config_lib.use_model(config, name)
        config.data.max_length, config.model.dtype = LENGTH, dtype
        config.model.update({key: 1 for key in ("n_layers", "num_layers") if key in config.model})
        settings = config_lib.resolve(config).model
        # To initialise a model takes longer than to compile it.
        model = nnx.eval_shape(
            lambda s=settings: build(s, n_items=ITEMS, n_users=3, max_length=LENGTH)
        )
        users = {"users": jnp.array([1, 2, 3])} if model.needs_users else {}
        graph, params = nnx.split(model)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda v, r=rng: r.normal(0, 0.1, v.shape).astype("float32"), params)
        encode = jax.jit(lambda params, g=graph, u=users: _encode(g, params, items, gaps, u))
        states.append(encode(params))
        assert states[-1].dtype == dtype
    exact, narrow = (np.asarray(state, np.float32) for state in states)
    assert 0 < np.linalg.norm(narrow - exact) < 2e-2 * np.linalg.norm(exact)


def _encode(graph, params, items, gaps, users):
    return nnx.merge(graph, params).encode(items, LENGTHS, gaps, **users)


def test_gradients_of_items_are_summed_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    settings = dict(dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    table = ItemEmbedding(3, 2, features=None, embedding_init=nnx.initializers.ones, **settings)
    rows = jnp.ones(4096, jnp.int32)
    gradient = nnx.grad(lambda table: table(rows).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(gradient.embedding[...], [[0, 0], [4096, 4096], [0, 0]])


def test_the_values_of_many_pairs_of_one_distance_are_summed_in_float32():
    distance, ones = jnp.zeros((1, 1, 1000), jnp.int32), jnp.ones((2, 1, 1), jnp.bfloat16)
    relation = TimeRelation(distance, ones, ones, 0.0, None)
    weights = jnp.full((1, 1, 1, 1000), 1 / 1024, jnp.bfloat16)
    assert float(relation.add_up(weights)[0, 0, 0, 0]) == pytest.approx(1000 / 1024, rel=2**-8)
