"""A table that is drawn in parts has the bits of one that JAX draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tim4rec_jax.layers import draws
from tim4rec_jax.layers.draws import in_parts


@pytest.mark.parametrize("columns", [3, 6])
def test_a_table_in_parts_has_the_same_bits(columns, monkeypatch):
    """Rows beyond 2^16, columns that are no multiple of those drawn at once, a scale by shape."""
    shape, key = (70_001, columns), jax.random.key(5)
    init = nnx.initializers.glorot_normal()
    monkeypatch.setattr(draws, "_LARGE", 1)
    found, expected = (np.asarray(f(key, shape, jnp.float32)) for f in (in_parts(init), init))
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


def test_the_places_of_elements_pass_32_bits():
    """The last rows of a table of 8.6e9 elements, whose words Python computes without a limit."""
    rows, columns = np.array([0, 2**16 - 1, 2**26, 2**27 + 77, 2**31 - 1], np.uint32), 200
    column = np.array([[0], [columns - 1]], np.uint32)
    high, low = draws.words(jnp.asarray(rows), jnp.asarray(column), columns)
    for j in range(2):
        for i, row in enumerate(rows):
            place = int(row) * columns + int(column[j, 0])
            assert (int(high[j, i]), int(low[j, i])) == divmod(place, 2**32)
