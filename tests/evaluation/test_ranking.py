"""Counting in blocks against a full sort, on scores that no summation order can change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tim4rec_jax import item_rows
from tim4rec_jax.evaluation import ranking
from tim4rec_jax.evaluation.evaluate import _score_on_shards
from tim4rec_jax.evaluation.ranking import LARGEST_BLOCK, UNRANKED, ranks, ranks_and_ties, top_k
from tim4rec_jax.layers.neighbours import Neighbours
from tim4rec_jax.models import SequenceModel
from tim4rec_jax.runtime import make_mesh
from tim4rec_jax.scoring import HistoryItems, LastItem, history_bias

NAN, INF = float("nan"), float("inf")


def integers(rng, *shape):
    """Small whole numbers: every product is exact, and there are many ties."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def naive_scores(hidden, table, exclude, history=None, keep=None):
    scores = hidden @ table.T
    if history is not None:
        for row, items in enumerate(history.items):
            scores[row, np.unique(items)] += history.repeat_bias
        if history.at_end is not None:
            scores[np.arange(len(scores)), history.at_end.item] += history.at_end.added
    scores[:, 0] = -INF
    for row, items in enumerate(exclude):
        for item in items:
            if keep is None or item != keep[row]:
                scores[row, item] = -INF
    return scores


# Numbers of items, block sizes and k: one block and several, k below and above either number.
SHAPES = [(1, 1, 7), (5, 8, 7), (20, 1, 7), (20, 8, 1), (20, 8, 25), (20, 21, 7)]
ALL_SHAPES = [(*sizes, k) for sizes in dict.fromkeys(s[:2] for s in SHAPES) for k in (1, 7, 25)]


@st.composite
def problems(draw, shapes):
    """Random numbers in few shapes, each of which is compiled."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items, block_size, k = draw(st.sampled_from(shapes))
    hidden, table = integers(rng, 4, 2), integers(rng, items + 1, 2)
    targets = rng.integers(1, items + 1, 4).astype(np.int32)
    exclude = rng.integers(0, items + 1, (4, 5)).astype(np.int32)
    items = rng.integers(0, items + 1, (4, 3)).astype(np.int32)
    last = jax.device_put(items[:, 0]), jnp.asarray(integers(rng, 4) * (items[:, 0] > 0))
    history = HistoryItems(jax.device_put(items), jnp.float32(-2), at_end=LastItem(*last))
    return hidden, table, targets, exclude, history, block_size, k


@settings(max_examples=60, deadline=None)
@given(problems(SHAPES))
def test_ranks_equal_the_naive_ones(problem):
    hidden, table, targets, exclude, history, block_size, _ = problem
    scores = naive_scores(hidden, table, exclude, history, keep=targets)
    own = np.take_along_axis(scores, targets[:, None], 1)
    expected = 1 + (scores > own).sum(1), (scores == own).sum(1) - 1
    options = dict(block_size=block_size, exclude=exclude, history=history)
    got = ranks_and_ties(hidden, table, targets, **options)
    np.testing.assert_array_equal(got, expected)


@settings(max_examples=60, deadline=None)
@given(problems(SHAPES))
def test_top_k_equals_the_naive_one(problem):
    check_top_k(*problem)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(problems(ALL_SHAPES))
def test_top_k_equals_the_naive_one_in_all_shapes(problem):
    check_top_k(*problem)


def check_top_k(hidden, table, targets, exclude, history, block_size, k):
    del targets
    scores = naive_scores(hidden, table, exclude, history)
    items = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, items, 1)
    fill = ((0, 0), (0, k - items.shape[1]))
    best = np.pad(best, fill, constant_values=-INF)
    items = np.where(best == -INF, 0, np.pad(items, fill))
    options = dict(block_size=block_size, exclude=exclude, history=history)
    got_scores, got_items = top_k(hidden, table, k, **options)
    np.testing.assert_array_equal(got_scores, best)
    np.testing.assert_array_equal(got_items, items)


def test_without_exclusion():
    hidden, table = np.ones((1, 1), np.float32), np.array([[9], [1], [3], [2]], np.float32)
    targets = np.array([3], np.int32)
    assert ranks(hidden, table, targets).tolist() == [2]
    scores, items = top_k(hidden, table, 2)
    assert (scores.tolist(), items.tolist()) == ([[3.0, 2.0]], [[2, 3]])


@pytest.mark.parametrize("block_size", [16, pytest.param(64, marks=pytest.mark.slow), 1000])
def test_a_twin_of_the_target_is_a_tie_whatever_its_position(block_size, monkeypatch):
    """The same embedding twice: rounding must not put one of the two ahead.

    So one product must score the targets and all items. Which product rounds how depends on the
    processor. Here the numbers are whole, which none rounds, and a quarter more for every other
    item plays the rounding of the product of the blocks.
    """

    def scores(hidden, table, ids):
        return jnp.matmul(hidden, table[ids].T) + jnp.where(ids % 150 % 2 == 0, 0.25, 0)

    monkeypatch.setattr(ranking, "_scores", scores)
    rng = np.random.default_rng(0)
    hidden, table = integers(rng, 33, 50), integers(rng, 301, 50)
    table[151:] = table[1:151]
    first = rng.integers(1, 151, 33).astype(np.int32)
    run = jax.jit(lambda *arrays: ranks_and_ties.__wrapped__(*arrays, block_size=block_size))
    (below, below_ties), (above, ties) = (run(hidden, table, first + n) for n in (0, 150))
    expected = naive_scores(hidden, table, np.zeros((33, 0), int))
    expected += np.where(np.arange(301) % 150 % 2 == 0, 0.25, 0)
    own = np.take_along_axis(expected, first[:, None], 1)
    np.testing.assert_array_equal(below, 1 + (expected > own).sum(1))
    np.testing.assert_array_equal(below, above)
    np.testing.assert_array_equal(ties, (expected == own).sum(1) - 1)
    np.testing.assert_array_equal(ties, below_ties)


def test_equals_that_fill_the_largest_block():
    """More than a float32 could count if the two numbers met in it."""
    hidden, table = np.ones((2, 1), np.float32), np.full((2 * LARGEST_BLOCK + 2, 1), 2, np.float32)
    table[-1] = 3
    found = ranks_and_ties(hidden, table, np.array([5, LARGEST_BLOCK]), block_size=LARGEST_BLOCK)
    np.testing.assert_array_equal(found, [[2, 2], [2 * LARGEST_BLOCK - 1] * 2])
    with pytest.raises(ValueError, match="at most 2048"):
        ranks(hidden, table, np.array([5, 5]), block_size=LARGEST_BLOCK + 1)


def test_nan_is_never_a_good_rank():
    hidden = np.array([[NAN], [1.0], [1.0]], np.float32)
    table = np.array([[0], [1], [NAN], [3], [4]], np.float32)
    targets = np.array([4, 2, 4], np.int32)
    found, ties = ranks_and_ties(hidden, table, targets, block_size=3)
    assert (found.tolist(), ties.tolist()) == ([UNRANKED, UNRANKED, 2], [0, 0, 0])
    _, items = top_k(hidden, table, 4, block_size=3)
    assert items.tolist() == [[0, 0, 0, 0], [4, 3, 1, 0], [4, 3, 1, 0]]


def test_infinite_scores_are_ordered():
    hidden = np.ones((3, 1), np.float32)
    table = np.array([[0], [INF], [-INF], [1]], np.float32)
    targets = np.array([1, 2, 3], np.int32)
    assert ranks(hidden, table, targets, block_size=2).tolist() == [1, 3, 2]


def test_bfloat16_is_ranked_in_float32():
    hidden = jnp.ones((1, 2), jnp.bfloat16)
    table = jnp.array([[0, 0], [256, 0], [256, 1]], jnp.bfloat16)  # 257 is no bfloat16
    targets = jnp.array([1])
    assert ranks(hidden, table, targets).tolist() == [2]
    assert top_k(hidden, table, 1)[0].tolist() == [[257.0]]


def test_float64_stays(x64):
    hidden, table = jnp.ones((1, 1)), jnp.array([[0.0], [1.0], [1.0 + 1e-12]])
    assert ranks(hidden, table, jnp.array([1])).tolist() == [2]
    assert top_k(hidden, table, 1)[1].tolist() == [[2]]


def test_memory_does_not_grow_with_the_catalogue():
    def temporaries(n_items):
        shapes = [(64, 8), (n_items + 1, 8)]
        floats = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
        targets = jax.ShapeDtypeStruct((64,), np.int32)
        compiled = ranks.lower(*floats, targets, block_size=256).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores_of_million = 64 * 1_000_000 * 4
    assert temporaries(1_000_000) < temporaries(10_000) + scores_of_million / 25


class TableModel(SequenceModel):
    """As much of a model as scoring needs."""

    def __init__(self, table, neighbours):
        self.table, self.neighbours = nnx.Param(jnp.asarray(table)), neighbours
        self.offset = nnx.Param(jnp.float32(-2))
        self.last_offset = nnx.Param(jnp.arange(len(table)) % 3 / 60)

    def item_table(self):
        return self.table[...]

    def repeat_bias(self):
        return self.offset[...]


@pytest.mark.parametrize("shape", [(2, 4), pytest.param((8, 1), marks=pytest.mark.slow)])
def test_every_device_scores_its_own_items(shape):
    """Ranks, ties and lists are those of one device, to the bit; whole numbers make many ties."""
    rng, mesh, rows = np.random.default_rng(0), make_mesh(*shape, jax.devices()), 93
    hidden, table = integers(rng, 5, 2), integers(rng, rows, 2)
    targets = rng.integers(1, rows, 5).astype(np.int32)
    items = rng.integers(0, rows, (5, 6)).astype(np.int32)
    filled = np.pad(table, ((0, 3), (0, 0)), constant_values=50)  # they would win
    near = rng.integers(0, rows, (rows, 3)).astype(np.int32), rng.random((rows, 3), np.float32)
    model = TableModel(filled, Neighbours(*near, 1.0))

    def score(hidden, table, targets, **options):
        found = ranks_and_ties(hidden, table, targets, block_size=8, **options)
        return found, top_k(hidden, table, 20, block_size=8, **options)

    history = history_bias(model).of(jax.device_put(items))
    expected = score(hidden, table, targets, exclude=items, history=history)
    graphdef, state = nnx.split(model)
    weights = item_rows.split(state, ("table",))
    arguments = score, True, graphdef, mesh, rows, ("table",), hidden, targets, items
    found = _score_on_shards(*arguments, *weights)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
