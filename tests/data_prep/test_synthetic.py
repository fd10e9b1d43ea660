"""The ceilings are what simulation, and ranking by hand, give."""

import numpy as np
import pytest

from tim4rec_jax.data_prep import synthetic
from tim4rec_jax.data_prep.flags import parser
from tim4rec_jax.errors import UserError

USERS, ITEMS = 30_000, 60


@pytest.fixture(scope="module")
def events():
    return synthetic.generate(USERS, ITEMS, seed=1)


@pytest.fixture(scope="module")
def weak_events():
    return synthetic.generate(USERS, ITEMS, seed=1, effect=0.25)


def test_conditionals_are_probabilities():
    interest, probabilities = synthetic.conditionals(ITEMS)
    assert probabilities.shape == (2, 5, ITEMS)
    np.testing.assert_allclose(probabilities.sum(-1), 1)
    assert (probabilities > 0).all()
    for long in (0, 1):
        for now in range(5):
            focus = probabilities[long, now, interest == (now + long) % 5].sum()
            np.testing.assert_allclose(focus, 0.9 + 0.1 / 5)


@pytest.mark.parametrize("name, effect", [("events", 1), ("weak_events", 0.25)])
def test_events_follow_the_conditionals(name, effect, request):
    items, times, _ = request.getfixturevalue(name)
    interest, probabilities = synthetic.conditionals(ITEMS, effect)
    long = np.diff(times) >= synthetic.LONG[0]
    for is_long in (False, True):
        for now in (0, 3):
            # The gap before event n, and event n's interest, decide on event n + 1.
            here = (long[:, :-1] == is_long) & (interest[items[:, 1:-1]] == now)
            following = items[:, 2:][here]
            found = np.bincount(following, minlength=ITEMS) / len(following)
            error = np.sqrt(probabilities[int(is_long), now] / len(following))
            assert (np.abs(found - probabilities[int(is_long), now]) < 5 * error).all()


def test_gaps(events):
    _, times, lengths = events
    gaps = np.diff(times)
    long = gaps >= synthetic.LONG[0]
    assert abs(long.mean() - synthetic.LONG_GAP) < 0.01
    assert gaps.min() >= synthetic.SHORT[0] and gaps[~long].max() < synthetic.SHORT[1]
    assert (times < 2**24).all() and (times[:, 0] >= 0).all()
    assert lengths.min() == synthetic.LENGTHS[0] and lengths.max() == synthetic.LENGTHS[1]


def test_items_do_not_betray_the_last_gap(events):
    items, times, _ = events
    interest, _ = synthetic.conditionals(ITEMS)
    long = np.diff(times) >= synthetic.LONG[0]
    # Whatever the last two interests are, the last gap is long as often as ever.
    for before in range(5):
        for now in range(5):
            here = (interest[items[:, -2]] == before) & (interest[items[:, -1]] == now)
            share = long[here, -1].mean()
            assert abs(share - synthetic.LONG_GAP) < 5 * np.sqrt(0.24 / here.sum())


@pytest.mark.parametrize("split, back", [("test", 1), ("valid", 2)])
@pytest.mark.parametrize("name, effect", [("events", 1), ("weak_events", 0.25)])
def test_oracle_is_what_ranking_by_the_truth_gives(name, effect, split, back, request):
    items, times, lengths = request.getfixturevalue(name)
    ceilings = synthetic.oracle(items, times, lengths, ITEMS, effect)[split]
    interest, probabilities = synthetic.conditionals(ITEMS, effect)
    users = np.arange(USERS)
    target, last = items[users, lengths - back], lengths - back - 1
    long = (times[users, last] - times[users, last - 1] >= synthetic.LONG[0]).astype(int)
    beliefs = {
        "with_time": probabilities[long, interest[items[users, last]]],
        "time_blind": (0.6 * probabilities[0] + 0.4 * probabilities[1])[
            interest[items[users, last]]
        ],
    }
    for name, belief in beliefs.items():
        at_target = belief[users, target][:, None]
        # Ties, broken at random in the mean.
        above, equal = (belief > at_target).sum(1), (belief == at_target).sum(1)
        rank = above + np.random.default_rng(0).integers(equal) + 1
        hits = rank <= 10
        gains = hits / np.log2(rank + 1)
        for key, found in (("hit@10", hits), ("ndcg@10", gains)):
            assert abs(found.mean() - ceilings[name][key]) < 4 * found.std() / np.sqrt(USERS)


def test_the_effect_moves_only_what_time_says():
    _, most = synthetic.conditionals(ITEMS)
    shares = [1 - synthetic.LONG_GAP, synthetic.LONG_GAP]
    for effect in (0.0, 0.25, 0.5):
        _, probabilities = synthetic.conditionals(ITEMS, effect)
        for found in (most, probabilities):
            blind = np.average(found, axis=0, weights=shares)
            np.testing.assert_allclose(blind, np.average(most, axis=0, weights=shares))
        apart = probabilities[1] - probabilities[0]
        np.testing.assert_allclose(apart, effect * (most[1] - most[0]), atol=1e-15)
    last, gaps = np.arange(ITEMS), np.arange(ITEMS) % 2 == 1
    worth = [
        best["with_time"]["ndcg@10"] - best["time_blind"]["ndcg@10"]
        for effect in (0.0, 0.1, 0.5, 1.0)
        if (best := synthetic.ceilings(last, gaps, ITEMS, effect))
    ]
    assert worth[0] == 0 and worth == sorted(set(worth))


def test_default_preset_leaves_room_for_time(run):
    metadata = run("synthetic").metadata
    assert (metadata["users"], metadata["items"]) == (4_000, 300)
    test = metadata["oracle"]["test"]
    assert test["time_blind"]["ndcg@10"] < 0.75 * test["with_time"]["ndcg@10"]
    assert test["time_blind"]["hit@10"] < 0.8 * test["with_time"]["hit@10"]


def test_dataset_holds_what_is_generated(run, histories):
    ds = run("synthetic", "--users", "50", "--items", "40", "--seed", "3")
    items, times, lengths = synthetic.generate(50, 40, 3)
    for user, found in enumerate(histories(ds).values()):
        count = lengths[user]
        assert [time for _, time in found] == times[user, :count].tolist()
        assert [int(item[1:]) for item, _ in found] == items[user, :count].tolist()


def test_seeds(run):
    def content(*flags):
        return run("synthetic", "--users", "50", *flags).directory.joinpath("sequences.arrow")

    first = content().read_bytes()
    assert content("--seed", "0").read_bytes() == first
    assert content("--seed", "1").read_bytes() != first


@pytest.mark.parametrize("effect", ["-0.1", "1.5", "strong", "nan"])
def test_an_effect_is_between_0_and_1(effect):
    with pytest.raises(UserError, match="argument --effect: "):
        parser().parse_args(["synthetic", "--out", "data", f"--effect={effect}"])


def test_the_effect_is_in_the_dataset(run):
    def metadata(*flags):
        return run("synthetic", "--users", "300", "--items", "40", *flags).metadata

    plain, none = metadata(), metadata("--effect", "0")
    assert (plain["effect"], none["effect"]) == (1, 0)
    test = none["oracle"]["test"]
    assert test["with_time"] == pytest.approx(test["time_blind"])


@pytest.mark.parametrize("flags", [("--users", "0"), ("--items", "23")])
def test_too_small(run, flags):
    assert "at least 1 user and 24 items (two interests) are needed" in run(
        "synthetic", *flags, fails=True
    )
