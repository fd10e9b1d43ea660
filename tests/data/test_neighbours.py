"""Neighbours counted by sorting against a loop over all pairs."""

import numpy as np
import pytest

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import item_neighbours, neighbours

LENGTHS = [2, 3, 5, 40, 14, 2, 30, 7]
N_ITEMS = 12


def naive(histories, count, follow):
    """The neighbours of each item, pair by pair; the last two events of a user are held out."""
    near = np.zeros((N_ITEMS + 1, N_ITEMS + 1))
    events = np.zeros(N_ITEMS + 1)
    for items, _ in histories:
        items = items[:-2]
        np.add.at(events, items, 1)
        for i in range(len(items)):
            for j in range(max(0, i - 20), i):
                if items[i] != items[j]:
                    near[items[j], items[i]] += 0.9 ** (i - j - 1)
                    if not follow:
                        near[items[i], items[j]] += 0.9 ** (i - j - 1)
    events = np.maximum(events, 1)
    similarity = near / (events[:, None] ** 0.5 * events**0.3)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(similarity, order, 1)
    return np.where(values > 0, order, 0), values


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("at_once", [1, 500, 1 << 25])
def test_equal_the_naive_ones(at_once, follow, monkeypatch):
    monkeypatch.setattr(neighbours, "_PAIRS_AT_ONCE", at_once)
    histories = random_histories(LENGTHS, n_items=N_ITEMS)
    dataset = in_memory(histories, n_items=N_ITEMS, splits=(3, 5))
    items, similarity = item_neighbours(dataset, 5, follow=follow)
    expected_items, expected = naive(histories, 5, follow)
    assert items.dtype == np.int32 and similarity.dtype == np.float32
    np.testing.assert_allclose(similarity, expected, rtol=1e-6)
    # Equal similarities may differ in the last bit, so their items are compared by similarity.
    apart = np.abs(np.diff(expected, axis=1, append=-1)) > 1e-6
    apart &= np.abs(np.diff(expected, axis=1, prepend=9)) > 1e-6
    np.testing.assert_array_equal(items[apart], expected_items[apart])


def test_held_out_events_change_nothing():
    histories = random_histories(LENGTHS, n_items=N_ITEMS)
    others = [(np.append(items[:-2], [1, 2]).astype(np.int32), times) for items, times in histories]
    one, other = (item_neighbours(in_memory(h, n_items=N_ITEMS), 4) for h in (histories, others))
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
