"""The synthetic processes have one rate and differ in their burstiness; other parts of studies."""

import math

import numpy as np
import pytest

from studies import burstiness, high_dimension, length, width
from studies.report import Estimate, Results

GAPS = {
    name: burstiness.process_gaps(name, np.random.default_rng(0), (2000, 100))
    for name in burstiness.PROCESSES
}
CV = {name: (gaps.std(1) / gaps.mean(1)).mean() for name, gaps in GAPS.items()}


@pytest.mark.parametrize("name", burstiness.PROCESSES)
def test_a_process_has_the_common_rate(name):
    # 200,000 gaps, of which those of a Hawkes process come in clusters of 1 / (1 - .7).
    error = GAPS[name].mean(1).std() / math.sqrt(len(GAPS[name]))
    assert abs(GAPS[name].mean() - 1 / burstiness.RATE) < 4 * error
    assert error < 0.02 / burstiness.RATE


def test_processes_differ_in_their_burstiness():
    exact = np.random.default_rng(1).exponential(size=(2000, 100))
    assert CV["poisson"] == pytest.approx((exact.std(1) / exact.mean(1)).mean(), abs=0.01)
    assert CV["hawkes"] > 1.5 * CV["poisson"]
    assert not ((GAPS["sessions"] > 500) & (GAPS["sessions"] < 60_000)).any()


def test_events_of_a_hawkes_process_cause_others():
    """The mean number of events within a time after an event is that of theory.

    With branching ratio n and forgetting f, the rate at a time t after an event is RATE +
    c e^(-f (1 - n) t), where c = n f (2 - n) / (2 (1 - n)) (Hawkes, 1971).
    """
    n, f = burstiness.BRANCHING, burstiness.FORGETTING
    times = GAPS["hawkes"].cumsum(1)
    span = 2 / f
    whole = times < times[:, -1:] - span  # events whose whole span was observed
    counts = [np.searchsorted(t, t + span, "right") - np.arange(len(t)) - 1 for t in times]
    found = np.stack(counts)
    per_user = (found * whole).sum(1) / whole.sum(1)
    fading = f * (1 - n)
    excess = n * f * (2 - n) / (2 * (1 - n)) * (1 - math.exp(-fading * span)) / fading
    expected = burstiness.RATE * span + excess
    assert found[whole].mean() == pytest.approx(expected, rel=0.05)
    assert per_user.mean() > 5 * burstiness.RATE * span


def test_a_trend_is_that_of_weighted_least_squares():
    gains = {16: Estimate(0.4, 0.1, 3), 32: Estimate(0.3, 0.1, 3), 128: Estimate(0.1, 0.1, 3)}
    slope = high_dimension.trend(gains)
    assert slope == pytest.approx((-0.1, 0.1 / math.sqrt(14 / 3), 3))
    assert high_dimension.trend({16: gains[16]}) is None


def test_the_rule_of_width_finds_a_power_law():
    events = {"a": 1000, "b": 4000, "c": 16_000, "d": 64_000}
    best = {name: round(2 * count**0.5) for name, count in events.items()}
    assert width.rule(best, events)[0] == pytest.approx(0.5, abs=0.01)
    said = width.left_out(best, events)
    assert all(said[name] == pytest.approx(best[name], rel=0.02) for name in best)


def test_curves_cross_where_one_stays_dearer():
    def curve(*values):
        return {2**k: Estimate(value, 0.0, 1) for k, value in enumerate(values)}

    flat = curve(2, 2, 2, 2, 2)
    assert length.crossing(curve(1, 3, 1, 3, 4), flat) == (4, 8)
    assert length.crossing(curve(1, 1, 1, 1, 1), flat) is None
    assert length.crossing(curve(3, 3, 3, 3, 3), flat) is None


def test_the_model_of_costs_grows_with_length_for_attention_alone():
    rows = [
        {"dataset": "", "arm": kind, "seed": "", "what": "cost", "at": n, "length": n, "se": 0.0}
        | {"cpu_s": 2e-9 * 3 * each.flops(n), "flops": 3 * each.flops(n), "bytes": 1.0}
        for kind, each in length.KINDS.items()
        for n in length.COSTS[:3]
    ]
    results = Results([], [], rows)
    for kind in length.KINDS:
        model = length.modelled(results, kind, "flops")
        for n, cost in length.costs(results, kind).items():
            assert model[n] == pytest.approx(cost.value)
        growth = model[length.COSTS[-1]] / model[length.COSTS[2]]
        assert growth > 50 if kind == "attention" else growth < 1.3
