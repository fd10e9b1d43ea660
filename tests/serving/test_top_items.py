import jax
import numpy as np
import pytest

from tim4rec_jax.serving.top_items import _best_of_block


@pytest.mark.parametrize("values", [3, 40, 10**6])
def test_the_best_of_groups_are_the_best_of_all(values):
    """With many equal scores as with none; of equals the earlier one comes first."""
    rng = np.random.default_rng(values)
    scores = rng.integers(-values, values, (4, 4096)).astype(np.float32)
    scores[1, rng.random(4096) < 0.999] = -np.inf  # fewer than 16 may be left
    found, places = jax.jit(_best_of_block, static_argnums=1)(scores, 16)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :16]
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, 1))
