"""Losses against their definitions, and the gradients of the fast forms against the plain ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.scoring import HistoryItems, last_item
from tim4rec_jax.training import losses as full
from tim4rec_jax.training.losses import (
    Loss,
    bpr,
    cross_entropy,
    gbce,
    sampled_softmax,
    summed_cross_entropy,
)
from tim4rec_jax.training.negatives import item_frequencies

rng = np.random.default_rng(0)
HIDDEN, TABLE = rng.standard_normal((6, 8)), rng.standard_normal((20, 8))
TARGETS = jnp.array([0, 1, 5, 19, 7, 7], jnp.int32)


def test_is_minus_log_softmax_over_all_rows_and_so_is_its_gradient(x64):
    def plain(hidden, table):
        return -jax.nn.log_softmax(hidden @ table.T)[jnp.arange(6), TARGETS]

    def ours(hidden, table):
        return cross_entropy(hidden, table, TARGETS)

    inputs = jax.device_put(HIDDEN), jax.device_put(TABLE)
    np.testing.assert_allclose(jax.jit(ours)(*inputs), plain(*inputs), rtol=1e-13)
    weights = jnp.arange(1.0, 7.0)
    gradients = [
        jax.jit(jax.grad(lambda *inputs, f=f: weights @ f(*inputs), argnums=(0, 1)))(*inputs)
        for f in (ours, plain)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *gradients)


def test_the_padding_row_counts(x64):
    larger = TABLE.copy()
    larger[0] *= 3
    loss = jax.jit(cross_entropy)
    losses = [loss(jax.device_put(HIDDEN), jax.device_put(t), TARGETS) for t in (TABLE, larger)]
    assert np.all(np.abs(losses[0] - losses[1]) > 1e-6)


def test_bfloat16_scores_add_up_in_float32():
    hidden, table = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(TABLE, jnp.bfloat16)
    loss = jax.jit(cross_entropy)(hidden, table, TARGETS)
    assert loss.dtype == jnp.float32
    wide = hidden.astype(jnp.float32), table.astype(jnp.float32)
    exact = jax.jit(cross_entropy)(*wide, TARGETS)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)


def test_scores_of_history_items_get_the_repeat_bias_once(x64):
    """Row by row, also where the target is among them."""
    items = jnp.array([[5, 0, 7, 7], [19, 3, 3, 1]])
    first, last = jnp.array([0, 0, 2, 0, 1, 3]), jnp.array([0, 1, 3, 0, 2, 3])
    scores = HIDDEN @ TABLE.T
    for row, items_before in enumerate([{5}, {5}, {7}, {19}, {3}, {1}]):
        scores[row, list(items_before)] -= 1.5
    history = HistoryItems(items, jnp.asarray(-1.5), first, last)
    got = jax.jit(cross_entropy)(jax.device_put(HIDDEN), jax.device_put(TABLE), TARGETS, history)
    wanted = -jax.nn.log_softmax(scores)[jnp.arange(6), TARGETS]
    np.testing.assert_allclose(got, wanted, rtol=1e-13)


def test_the_score_of_the_last_item_gets_what_is_its_own(x64):
    recent = jnp.array([[5, 0], [3, 7], [7, 7], [19, 7], [7, 2], [0, 0]])
    own = jnp.arange(20.0) / 10
    scores = HIDDEN @ TABLE.T
    for row, item in [(0, 5), (1, 3), (3, 19), (4, 7)]:  # 7 has come twice already, 0 is no item
        scores[row, item] += item / 10
    items = jnp.zeros((6, 1), int)
    history = HistoryItems(items, jnp.asarray(0.0), at_end=last_item(own, recent))
    got = jax.jit(cross_entropy)(jax.device_put(HIDDEN), jax.device_put(TABLE), TARGETS, history)
    wanted = -jax.nn.log_softmax(scores)[jnp.arange(6), TARGETS]
    np.testing.assert_allclose(got, wanted, rtol=1e-13)


@pytest.mark.parametrize("offset", [None, -1.5])
@pytest.mark.parametrize("rows", [7, 40])
@pytest.mark.parametrize("last", [False, True])
def test_in_blocks_it_is_the_same_sum_with_the_same_gradients(rows, offset, last, x64, monkeypatch):
    monkeypatch.setattr(full, "block_rows", lambda items: 8)
    hidden, table = rng.standard_normal((rows, 8)), rng.standard_normal((20, 8))
    targets = jax.device_put(rng.integers(0, 20, rows))
    weights = jnp.asarray(rng.integers(0, 3, rows), jnp.float64)
    history = None
    if offset is not None:
        items = jax.device_put(rng.integers(0, 20, (1, rows)))
        places = jnp.arange(rows) // 2, jnp.arange(rows)
        history = HistoryItems(items, jnp.asarray(offset), *places)
    recent = jax.device_put(rng.integers(0, 20, (rows, 2)))
    targets = jnp.where(jnp.arange(rows) % 3 == 0, recent[:, 0], targets)
    inputs = (jax.device_put(hidden), jax.device_put(table)), history

    def plain(arrays, history):
        return 0.5 * weights @ cross_entropy(*arrays, targets, history)

    def blocked(arrays, history):
        return 0.5 * summed_cross_entropy(*arrays, targets, weights, history)

    def of(function):
        def total(arrays, offset, own):
            if history is None:
                return function(arrays, None)
            at_end = last_item(own, recent) if last else None
            return function(arrays, history._replace(repeat_bias=offset, at_end=at_end))

        own = jnp.linspace(-1.0, 1.0, 20)
        return jax.value_and_grad(total, argnums=(0, 1, 2))(
            inputs[0], jnp.asarray(offset or 0.0), own
        )

    # One program, or each operation would be one.
    (sum_, gradients), (blocked_sum, blocked_gradients) = jax.jit(
        lambda: (of(plain), of(blocked))
    )()
    np.testing.assert_allclose(blocked_sum, sum_, rtol=1e-12)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradients, blocked_gradients
    )


def test_scores_of_all_rows_never_exist_at_once():
    hidden, table = jnp.ones((4096, 8)), jnp.ones((5000, 8))
    targets, weights = jnp.zeros(4096, jnp.int32), jnp.ones(4096)
    gradient = jax.jit(jax.grad(summed_cross_entropy, argnums=(0, 1)))
    memory = gradient.lower(hidden, table, targets, weights).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 5000 * 4 / 4


WEIGHTS = np.array([1.0, 0.0, 1.0, 2.0, 1.0, 1.0])
DRAWN = jnp.array([5, 3, 19, 3, 11], jnp.int32)
LOG_SHARE = np.log(rng.dirichlet(np.ones(20)))[DRAWN]


def plain(name, hidden, table, bias=0.0, histories=(frozenset(),) * 6, own=None):
    """The losses again, one row and one drawn item after the other."""
    total = 0.0
    for n, (row, target, weight, seen) in enumerate(
        zip(hidden, TARGETS.tolist(), WEIGHTS, histories, strict=True)
    ):

        def added(j, seen=seen, n=n):
            last = own is not None and RECENT[n, 0] == j != RECENT[n, 1]
            return bias * (j in seen) + (own[j] if last else 0)

        right = row @ table[target] + added(target)
        others = [
            (row @ table[j] + added(j), share)
            for j, share in zip(DRAWN.tolist(), LOG_SHARE, strict=True)
            if j != target
        ]
        if name == "sampled_softmax":
            terms = [score - share - jnp.log(5.0) for score, share in others]
            loss = -jax.nn.log_softmax(jnp.stack([right, *terms]))[0]
        elif name == "gbce":
            wrong = sum(-jnp.log(1 - jax.nn.sigmoid(score)) for score, _ in others)
            loss = wrong - jnp.log(jax.nn.sigmoid(right) ** 0.4)
        else:
            pairs = [-jnp.log(jax.nn.sigmoid(right - score)) for score, _ in others]
            loss = sum(pairs) / len(pairs)
        total += weight * loss
    return total


SAMPLED = {
    "sampled_softmax": sampled_softmax,
    "gbce": functools.partial(gbce, power=0.4),
    "bpr": bpr,
}


# Two histories of four items; the six rows see growing parts of them, and an item may come twice.
ITEMS = jnp.array([[5, 3, 7, 7], [19, 3, 3, 7]])
FIRST, LAST = jnp.array([0, 0, 2, 0, 1, 3]), jnp.array([0, 1, 3, 0, 2, 3])
SEEN = [{5}, {5, 3}, {7}, {19}, {3}, {7}]
# The last two items of each row. Targets and drawn items are among them.
RECENT = np.array([[5, 0], [3, 5], [7, 7], [19, 0], [3, 3], [7, 3]])


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_losses_and_their_gradients(name, x64):
    """With and without a bias for the items of the history and the last of them."""
    function, weights = SAMPLED[name], jax.device_put(WEIGHTS)
    if name == "sampled_softmax":
        function = functools.partial(function, log_share=jax.device_put(LOG_SHARE))

    def ours(hidden, table, bias, own):
        history = HistoryItems(ITEMS, bias, FIRST, LAST)
        with_last = history._replace(at_end=last_item(own, jax.device_put(RECENT)))
        losses = [
            function(hidden, table, TARGETS, weights, each, drawn=DRAWN)
            for each in (None, history, with_last)
        ]
        return jnp.stack(losses).sum()

    def theirs(hidden, table, bias, own):
        without = plain(name, hidden, table) + plain(name, hidden, table, bias, SEEN)
        return without + plain(name, hidden, table, bias, SEEN, own)

    inputs = jax.device_put(HIDDEN), jax.device_put(TABLE), jnp.asarray(-1.5)
    inputs += (jnp.linspace(-1.0, 1.0, 20),)
    every = tuple(range(4))
    found = [jax.jit(jax.value_and_grad(f, argnums=every))(*inputs) for f in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), *found)


def test_whole_histories_are_those_without_first_and_last():
    hidden = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(TABLE, jnp.float32)
    items = jnp.concatenate([ITEMS, ITEMS, ITEMS])
    whole = HistoryItems(items, jnp.float32(2.0))
    parts = HistoryItems(items, jnp.float32(2.0), jnp.zeros(6, int), jnp.full(6, 3))
    weights = jnp.asarray(WEIGHTS, jnp.float32)
    losses = jax.jit(
        lambda *histories: [
            bpr(*hidden, TARGETS, weights, history, drawn=DRAWN) for history in histories
        ]
    )(whole, parts, None)
    assert losses[0] == losses[1] != losses[2]


def test_with_many_drawn_the_sampled_sum_is_that_over_all_items():
    counts = rng.integers(0, 50, 19)
    hidden, table = jnp.asarray(HIDDEN[1:], jnp.float32), jnp.asarray(TABLE, jnp.float32)
    rows = hidden, table, TARGETS[1:], jnp.asarray(WEIGHTS[1:], jnp.float32)
    frequencies = jax.device_put(item_frequencies(counts))
    loss = Loss("sampled_softmax", negatives=200_000)
    total = jax.jit(lambda key, f, rows: loss.prepare(key, 19, f)(*rows))(
        jax.random.key(0), frequencies, rows
    )
    # All items but the padding row.
    full = WEIGHTS[1:] @ jax.jit(cross_entropy)(hidden, table[1:], TARGETS[1:] - 1)
    np.testing.assert_allclose(total, full, rtol=0.01)


def test_the_power_of_gbce():
    key = jax.random.key(0)
    # Equation 8 of the paper at k = 3 of 12 others: a = 1/4, b = a (t (1 - 1/a) + 1/a).
    assert Loss("gbce", 3, 0.0).prepare(key, 13, None).keywords["power"] == 1
    assert Loss("gbce", 3, 1.0).prepare(key, 13, None).keywords["power"] == pytest.approx(0.25)
    assert Loss("gbce", 3, 0.5).prepare(key, 13, None).keywords["power"] == pytest.approx(0.625)


@pytest.mark.parametrize("name", ["gbce", "bpr"])
def test_any_item_but_padding_is_drawn(name):
    key = jax.random.key(1)
    drawn = jax.jit(lambda key: Loss(name, 500).prepare(key, 19, None).keywords["drawn"])(key)
    assert sorted({int(item) for item in drawn}) == list(range(1, 20))
