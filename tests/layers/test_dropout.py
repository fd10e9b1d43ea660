"""Dropout: rate, expectation, and masks that belong to rows instead of batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.layers import dropout, row_seeds
from tim4rec_jax.layers.basic import fold

SEEDS = row_seeds(jax.random.key(0), 64)
drop = jax.jit(dropout, static_argnums=1)


def mask(rate, seeds, shape=(40, 50)):
    return np.asarray(drop(np.ones((len(seeds), *shape), np.float32), rate, seeds)) != 0


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4, 0.9])
def test_rate_and_expectation(rate):
    kept = mask(rate, SEEDS)
    error = 5 * np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < error / np.sqrt(kept.size)
    # Each row and each position by itself.
    assert np.abs(kept.mean((1, 2)) - (1 - rate)).max() < error / np.sqrt(kept[0].size)
    assert np.abs(kept.mean(0) - (1 - rate)).max() < 1.2 * error / np.sqrt(len(kept))
    scaled = np.asarray(drop(np.full((64, 40, 50), 3, np.float32), rate, SEEDS))
    np.testing.assert_allclose(scaled[kept], 3 / (1 - rate), rtol=1e-6)


def correlations(masks):
    flat = masks.reshape(len(masks), -1).astype(np.float64)
    return np.corrcoef(flat)[~np.eye(len(masks), dtype=bool)]


def test_masks_of_rows_sites_and_neighbours_are_independent():
    kept = mask(0.5, SEEDS)
    limit = 5 / np.sqrt(kept[0].size)
    assert np.abs(correlations(kept)).max() < limit
    # Seeds that differ in one bit only, as those of a counter would.
    assert np.abs(correlations(mask(0.5, np.arange(16, dtype=np.uint32)))).max() < limit
    sites = np.stack([mask(0.5, fold(SEEDS[:1], site))[0] for site in (-1, 0, 1, 2, 3)])
    assert np.abs(correlations(sites)).max() < limit
    # Elements beside each other, and a row with itself a few elements on.
    flat = kept.reshape(64, -1)
    for shift in (1, 2, 50):
        together = np.corrcoef(flat[:, shift:].ravel(), flat[:, :-shift].ravel())[0, 1]
        assert abs(together) < 5 / np.sqrt(flat.size)


def test_the_mask_of_a_row_does_not_depend_on_its_batch():
    whole = mask(0.5, SEEDS)
    parts = [mask(0.5, part) for part in (SEEDS[:1], SEEDS[1:17], SEEDS[17:33], SEEDS[33:49])]
    np.testing.assert_array_equal(np.concatenate(parts), whole[:49])
    np.testing.assert_array_equal(mask(0.5, SEEDS[::-1]), whole[::-1])


def test_off():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, SEEDS[:2]) is x
    assert fold(None, 3) is None


def test_the_gradient_passes_where_the_value_does():
    x = jnp.ones((4, 30))
    gradient = jax.grad(lambda x: drop(x, 0.25, SEEDS[:4]).sum())(x)
    np.testing.assert_array_equal(gradient, drop(x, 0.25, SEEDS[:4]))


def test_every_step_has_seeds_of_its_own():
    key = jax.random.key(1)
    steps = jax.vmap(lambda step: row_seeds(jax.random.fold_in(key, step), 100))(jnp.arange(50))
    assert len(np.unique(steps)) == 5000
