"""Packed epochs hold every target once, with its own past and nobody else's."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import PackedBatches
from tim4rec_jax.errors import UserError


def events(dataset, start, count):
    """Items and times of `count` events."""
    window = np.array([start]), np.array([count]), int(count)
    return dataset.items(*window)[0], dataset.timestamps(*window)[0]


@st.composite
def plans(draw):
    lengths = [*draw(st.lists(st.integers(1, 40), max_size=8)), draw(st.integers(4, 9))]
    max_length = draw(st.integers(1, 16))
    # Some ten batches an epoch are enough.
    least = 1 + sum(max(length - 3, 0) for length in lengths) // (10 * max_length)
    return {
        "lengths": lengths,
        "max_length": max_length,
        "batch_size": draw(st.integers(least, least + 4)),
        "seed": draw(st.integers(0, 2**32)),
    }


def packed(*, lengths, **arguments):
    dataset = in_memory(random_histories(lengths, n_items=1000), n_items=1000)
    return dataset, PackedBatches(dataset, **arguments)


def epoch_of(batches, epoch=0):
    first = epoch * batches.batches_per_epoch
    return [batches[first + number] for number in range(batches.batches_per_epoch)]


def segments_of(batch):
    """The segments of a batch, each a dict of its columns, row by row."""
    for row in range(len(batch["items"])):
        ids = np.where(batch["weights"][row] > 0, batch["segment_ids"][row], -1)
        for segment in np.unique(ids[ids >= 0]):
            yield {name: values[row][ids == segment] for name, values in batch.items()}


@given(plan=plans(), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_target_once(plan, epoch):
    dataset, batches = packed(**plan)
    expected = collections.Counter()
    for start, length in zip(dataset.offsets, dataset.lengths, strict=False):
        if length > 3:
            expected.update(events(dataset, start + 1, length - 3)[0])
    found = collections.Counter()
    for batch in epoch_of(batches, epoch):
        found.update(batch["targets"][batch["weights"] > 0])
    assert found == expected
    assert sum(found.values()) == batches.n_targets


@given(plan=plans(), windows=st.none() | st.integers(1, 3))
def test_segments_are_runs_of_one_history(plan, windows):
    dataset, batches = packed(**plan, windows_per_user=windows)
    histories = [
        (items.tolist(), times)
        for start, length in zip(dataset.offsets, dataset.lengths, strict=False)
        if length > 3
        for items, times in [events(dataset, start, length - 2)]
    ]
    for batch in epoch_of(batches):
        for segment in segments_of(batch):
            run = [*segment["items"].tolist(), int(segment["targets"][-1])]
            assert segment["targets"][:-1].tolist() == segment["items"][1:].tolist()
            places = [
                (times, at)
                for items, times in histories
                for at in range(len(items) - len(run) + 1)
                if items[at : at + len(run)] == run
            ]
            assert places
            time_to_next = [np.diff(times[at : at + len(run)]).tolist() for times, at in places]
            assert segment["time_to_next"].tolist() in time_to_next
            dates = [(times[at : at + len(run) - 1] / 86_400).astype("f4") for times, at in places]
            assert segment["dates"].tolist() in [each.tolist() for each in dates]
            assert segment["gaps"].tolist() == [0.0, *segment["time_to_next"][:-1].tolist()]


@given(plan=plans())
def test_only_the_end_of_an_epoch_is_padded(plan):
    _, batches = packed(**plan)
    weights = np.concatenate([batch["weights"].ravel() for batch in epoch_of(batches)])
    assert weights.tolist() == sorted(weights, reverse=True)
    assert 1 - batches.padding_share == pytest.approx(weights.mean())


@given(plan=plans(), windows=st.integers(1, 2))
def test_no_user_gives_more_than_the_windows_asked_for(plan, windows):
    dataset, batches = packed(**plan, windows_per_user=windows)
    most = windows * plan["max_length"]
    assert batches.n_targets == np.minimum(np.maximum(dataset.lengths - 3, 0), most).sum()
    assert sum(b["weights"].sum() for b in epoch_of(batches)) == batches.n_targets


def test_windows_move_from_epoch_to_epoch():
    _, batches = packed(lengths=[40], max_length=5, batch_size=1, seed=0, windows_per_user=1)
    firsts = {int(batches[epoch]["items"][0, 0]) for epoch in range(30)}
    assert len(firsts) > 10


@given(plan=plans(), processes=st.integers(1, 3))
def test_processes_share_the_batches(plan, processes):
    plan["batch_size"] *= processes
    dataset, whole = packed(**plan)
    lengths = plan.pop("lengths")
    assert lengths
    parts = [
        PackedBatches(dataset, **plan, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    for number in range(whole.batches_per_epoch):
        shares = [part[number] for part in parts]
        for name, values in whole[number].items():
            shared = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(shared, values)


@pytest.mark.parametrize("order", ["exact", "recbole"])
def test_events_of_one_moment_change_places(order):
    """Each event is a target once an epoch, with its time, and moments stay in order."""
    items = np.arange(1, 61, dtype=np.int32)
    times = 880_000_000 + np.arange(40) // 8 * 70  # as float32, they stay different
    dataset = in_memory([(items[:40], times), (items, np.arange(60) * 9)], n_items=60)
    dataset.metadata["order"] = order
    time_of = dict(zip(items.tolist(), times.tolist(), strict=False))
    plan = dict(max_length=7, batch_size=2, seed=1)
    batches = PackedBatches(dataset, shuffle_ties=True, **plan)
    parts = [
        PackedBatches(dataset, shuffle_ties=True, process_index=i, process_count=2, **plan)
        for i in range(2)
    ]
    orders = set()
    for epoch in range(4):
        targets = []
        for number, batch in enumerate(epoch_of(batches, epoch)):
            for name, values in batch.items():
                shares = [part[epoch * batches.batches_per_epoch + number][name] for part in parts]
                np.testing.assert_array_equal(np.concatenate(shares), values)
            for segment in segments_of(batch):
                run = [*segment["items"].tolist(), int(segment["targets"][-1])]
                assert run[1:] == segment["targets"].tolist()
                if segment["dates"][0] > 365:  # the user with many events of one moment
                    own = [time_of[item] for item in run]
                    assert own == sorted(own)
                    assert segment["time_to_next"].tolist() == np.diff(own).tolist()
                    assert segment["gaps"].tolist() == [0, *np.diff(own)[:-1]]
                    targets += run[1:]
        # All training events but the one that comes first, of which nobody knows which one it is.
        [first] = {*items[:38].tolist()} - {*targets}
        assert len(targets) == 37 and time_of[first] == times[0]
        orders.add(tuple(targets))
    assert len(orders) == 4 and tuple(items[1:38]) not in orders


def test_batches_are_a_function_of_their_number():
    arguments = dict(lengths=[9, 30, 4, 22], max_length=6, batch_size=2, seed=3)
    _, batches = packed(**arguments)
    seen = [batches[number] for number in range(12)]
    _, again = packed(**arguments)
    for number in (11, 0, 7, 3):
        for name, values in again[number].items():
            np.testing.assert_array_equal(values, seen[number][name])
    assert any((seen[0]["items"] != seen[batches.batches_per_epoch]["items"]).ravel())


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        pytest.param([5] * 20, {}, id="the order of the users"),
        pytest.param([200], {"windows_per_user": 1}, id="their windows"),
        pytest.param([40], {"shuffle_ties": True}, id="the order of the events of a moment"),
    ],
)
def test_seeds_and_epochs_draw_differently(lengths, settings):
    """Otherwise runs with several seeds would differ less than they seem to."""
    found = set()
    for seed in range(2):
        _, batches = packed(lengths=lengths, max_length=5, batch_size=2, seed=seed, **settings)
        for epoch in range(2):
            found.add(b"".join(batch["items"].tobytes() for batch in epoch_of(batches, epoch)))
    assert len(found) == 4


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(UserError, match="4 events"):
        packed(lengths=[3, 2], max_length=4, batch_size=1, seed=0)
    with pytest.raises(UserError, match="cannot be shared"):
        packed(lengths=[9], max_length=4, batch_size=3, seed=0, process_count=2)
