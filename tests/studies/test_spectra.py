"""What the page of the spectra proves, in numbers."""

import numpy as np
import pytest

from studies.spectra import effective_rank, spectrum

LENGTH = 24


def mask(d, a):
    """M[t,s] = a[s+1] ... a[t] d[s]."""
    total = np.cumsum(np.log(a))
    return np.tril(np.exp(total[:, None] - total)) * d


@pytest.fixture(params=["plain", "with time"])
def steps(request):
    """Step sizes and decays of a head, plain or with raw steps multiplied by a factor."""
    random = np.random.default_rng(1)
    raw = random.normal(0, 0.5, LENGTH)
    factor = random.normal(0, 2, LENGTH) if request.param == "with time" else 1.0
    d = np.log1p(np.exp(raw * factor))
    return d, np.exp(-0.8 * d)


def test_the_mask_is_semiseparable_and_its_inverse_has_two_diagonals(steps):
    M = mask(*steps)
    for p in range(LENGTH):
        values = np.linalg.svd(M[p:, : p + 1], compute_uv=False)
        assert values[1:].sum() <= 1e-12 * values[0]
    inverse = np.linalg.inv(M)
    two = np.tril(np.triu(inverse, -1))
    np.testing.assert_allclose(inverse, two, atol=1e-10 * np.abs(inverse).max())
    assert np.linalg.matrix_rank(M) == LENGTH


def test_the_condition_number_bounds_the_effective_rank(steps):
    d, a = steps
    values = np.linalg.svd(mask(d, a), compute_uv=False)
    condition = values[0] / values[-1]
    assert condition <= d.max() / d.min() * (1 + a[1:].max()) / (1 - a[1:].max())
    rank = effective_rank(mask(d, a)[None])[0]
    assert LENGTH / condition <= values.sum() / values[0] <= rank <= LENGTH


def test_the_limits_of_long_and_short_steps(steps):
    d, _ = steps
    shares = d / d.sum()
    long = effective_rank(mask(d, np.full(LENGTH, 1e-9)))
    np.testing.assert_allclose(long, np.exp(-(shares * np.log(shares)).sum()), rtol=1e-6)
    equal = np.full(LENGTH, 1e-9)
    triangle = 1 / (2 * np.sin((2 * np.arange(1, LENGTH + 1) - 1) * np.pi / (4 * LENGTH + 2)))
    short = spectrum(mask(equal, np.exp(-equal)))
    np.testing.assert_allclose(short, triangle / triangle.sum(), rtol=1e-6)
    assert effective_rank(mask(equal, np.exp(-equal))) < long  # longer steps raise the rank
    even = effective_rank(mask(np.ones(LENGTH), np.full(LENGTH, 1e-9)))
    assert long < even == pytest.approx(LENGTH)  # uneven steps lower it
