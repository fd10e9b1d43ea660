"""Hidden states that depend on the date."""

import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.layers.time import DateBias

DAY = 86_400


def drift(first, last, values):
    module = DateBias(len(values), 1, param_dtype=jnp.float32)
    module.spread_over(first, last)
    assert not module.vectors[...].any()
    module.vectors[...] = jnp.array(values, jnp.float32)[:, None] / 5  # what they are multiplied by
    return module


@pytest.mark.parametrize("first", [0, 19_000])
def test_is_linear_between_knots_and_constant_beyond(first):
    module = drift(first * DAY, (first + 20) * DAY, [1.0, 3.0, -2.0])
    days = first + jnp.array([-500.0, 0, 2.5, 5, 10, 15, 20, 20.5, 900])
    added = module(jnp.full((len(days), 1), 7.0), days)[:, 0] - 7
    np.testing.assert_allclose(added, [1, 1, 1.5, 2, 3, 0.5, -2, -2, -2], atol=1e-5)


def test_events_of_one_time_have_one_date():
    module = drift(5 * DAY, 5 * DAY, [1.0, 3.0])
    assert module(jnp.zeros((1, 1)), jnp.array([5.0])) == 1


def test_must_know_its_dates():
    module = DateBias(2, 1, param_dtype=jnp.float32)
    with pytest.raises(ValueError, match="pass date_range to build"):
        module(jnp.zeros((1, 1)), jnp.zeros(1))


def test_states_may_have_half_the_precision():
    module = drift(0, 20 * DAY, [1.0, 3.0])
    assert module(jnp.ones((2, 1), jnp.bfloat16), jnp.array([0.0, 10.0])).tolist() == [[2.0], [3.0]]
