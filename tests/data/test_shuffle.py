"""The shuffle is a permutation, a fair one, and never changes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tim4rec_jax.data.batches import permute

keys = st.tuples(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(0, 5))


@given(size=st.integers(1, 3000), key=keys)
def test_is_a_permutation(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(size=st.integers(1, 2**50), key=keys, seed=st.integers(0, 9))
def test_any_part_can_be_asked_for(size, key, seed):
    positions = np.random.default_rng(seed).integers(0, size, 5)
    together = permute(positions, size, key)
    assert ((together >= 0) & (together < size)).all()
    assert [int(permute(positions[i : i + 1], size, key)[0]) for i in range(5)] == list(together)


@pytest.mark.parametrize("size", [5, 64, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_place_is_as_likely_as_any_other(size):
    places = np.array([permute(np.arange(size), size, (0, epoch, 1)) for epoch in range(4000)])
    bins = min(size, 10)
    for position in (0, 1, size // 2, size - 1):
        counts = np.bincount(places[:, position] * bins // size, minlength=bins)
        expected = np.diff(-(-np.arange(bins + 1) * size // bins)) * 4000 / size
        # Chi-square: mean bins - 1, standard deviation sqrt(2 (bins - 1)).
        surplus = ((counts - expected) ** 2 / expected).sum() - (bins - 1)
        assert surplus < 6 * np.sqrt(2 * (bins - 1))


def test_neighbours_part():
    """Prefixes of one user are neighbours before the shuffle; no trace of that may remain."""
    size = 100_000
    shuffled = permute(np.arange(size), size, (3, 1, 4))
    steps = np.diff(shuffled)
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.02
    assert np.unique(steps).size > 0.5 * size
    other = permute(np.arange(size), size, (3, 2, 4))
    assert abs(np.corrcoef(shuffled, other)[0, 1]) < 0.02
    assert (shuffled == other).sum() < 10


def test_stays_the_same_for_ever():
    """A run must resume under a later release of numpy with the samples it would have had."""
    assert permute(np.arange(10), 10, (0, 0, 0)).tolist() == [2, 3, 4, 5, 6, 0, 9, 8, 7, 1]
