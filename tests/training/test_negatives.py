"""Items are drawn by their exact share of the events, however many events there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tim4rec_jax.training.negatives import _below, draw_by_frequency, item_frequencies

COUNT = 200_000
draw = jax.jit(draw_by_frequency, static_argnames="count")
# 200 items fill four blocks of rows; some are drawn thousands of times, some a few times.
FEW = np.random.default_rng(0).integers(0, 50, 199)
# Nine numbers of 30 to 31 bits: their sum passes 2^32 within a block, and so do single numbers.
MANY = np.array([3, 2, 1, 5, 4, 1, 2, 7, 3]) * 10**9
# A share of the sum of 1.5 * 2^31, where a remainder of 32 bits would draw the first half of the
# items 1.5 times as often as the second half.
UNEVEN = np.full(200, 3 * 2**30 // 200)


@pytest.mark.parametrize("counts", [FEW, MANY, UNEVEN], ids=["few", "many", "uneven"])
def test_items_are_drawn_by_their_share_of_all_events(counts):
    """A chi-squared test with a fixed seed; shares that are off by 10 % are noticed."""
    drawn, log_share = draw(jax.random.key(1), COUNT, jax.device_put(item_frequencies(counts)))
    shares = (counts + 1.0) / (counts + 1.0).sum()
    np.testing.assert_allclose(np.exp(log_share), shares[drawn - 1], rtol=1e-5)
    found = np.bincount(drawn, minlength=len(counts) + 1)
    assert found[0] == 0  # padding
    assert stats.chisquare(found[1:], shares * COUNT).pvalue > 0.01
    wrong = shares * np.where(np.arange(len(shares)) < len(shares) / 2, 1.1, 1)
    assert stats.chisquare(found[1:], wrong / wrong.sum() * COUNT).pvalue < 0.01


def test_a_number_below_a_total_is_the_upper_half_of_a_product_of_128_bits():
    words = np.random.default_rng(0).integers(0, 2**32, (1000, 2), np.uint32)
    words[:4] = [[0, 0], [2**32 - 1, 2**32 - 1], [0, 2**32 - 1], [2**32 - 1, 0]]
    for total in (1, 2**32 - 1, 2**32, 29 * 10**9, 2**64 - 1):
        pair = jnp.array([total >> 32, total % 2**32], jnp.uint32)
        found = np.asarray(jax.jit(_below)(words, pair)).tolist()
        expected = [((high << 32) + low) * total >> 64 for high, low in words.tolist()]
        assert [(high << 32) + low for high, low in found] == expected
