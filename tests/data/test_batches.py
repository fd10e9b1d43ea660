"""Epochs hold every sample once, whatever the buckets, the batch size, the processes."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import EvalBatches, TrainBatches, prefix_batch
from tim4rec_jax.errors import UserError


@st.composite
def plans(draw):
    """Lengths of histories, chunks, and arguments of `TrainBatches`, at least one sample in it."""
    max_length = draw(st.integers(1, 24))
    widths = draw(st.none() | st.sets(st.integers(1, max_length)))
    lengths = [*draw(st.lists(st.integers(1, 25), max_size=8)), draw(st.integers(4, 9))]
    # Some ten batches an epoch are enough.
    least = 1 + sum(max(length - 3, 0) for length in lengths) // 10
    return {
        "lengths": lengths,
        "splits": draw(st.sets(st.integers(1, 8))),
        "max_length": max_length,
        "batch_size": draw(st.integers(least, least + 11)),
        "seed": draw(st.integers(0, 2**32)),
        "convention": draw(st.sampled_from(["recbole", "exact"])),
        "buckets": None if widths is None else tuple(widths | {max_length}),
    }


def realise(*, lengths, splits, **arguments):
    return in_memory(random_histories(lengths), splits=splits), arguments


def samples_of(batch):
    real = batch["weights"] == 1
    return list(
        zip(batch["users"][real], batch["targets"][real], batch["lengths"][real], strict=True)
    )


def epoch_of(batches, epoch):
    first = epoch * batches.batches_per_epoch
    return [batches[number] for number in range(first, first + batches.batches_per_epoch)]


def assert_equal(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name])


@given(plan=plans(), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_sample_once(plan, epoch):
    dataset, arguments = realise(**plan)
    batches = TrainBatches(dataset, **arguments)
    expected = collections.Counter(
        (user, dataset.items(start + end, np.ones(1, int), 1)[0, 0], min(end, batches.max_length))
        for user, start in enumerate(dataset.offsets[:-1, None])
        for end in range(1, int(dataset.lengths[user]) - 2)
    )
    made = epoch_of(batches, epoch)
    assert collections.Counter(sample for batch in made for sample in samples_of(batch)) == expected
    assert batches.n_targets == expected.total()

    partial = 0
    for batch in made:
        rows, width = batch["items"].shape
        assert rows == batches.batch_size
        assert width in batches.buckets
        assert batch["lengths"].max() <= width
        assert set(batch["weights"]) <= {0.0, 1.0}
        assert batch["weights"][0] == 1
        partial += batch["weights"].min() == 0
    assert partial <= 1
    events = sum(batch["lengths"][batch["weights"] == 1].sum() for batch in made)
    slots = sum(batch["items"].size for batch in made)
    assert batches.padding_share == pytest.approx(1 - events / slots)


@settings(max_examples=30)
@given(plan=plans())
def test_a_batch_is_what_its_samples_say(plan):
    dataset, arguments = realise(**plan)
    batches = TrainBatches(dataset, **arguments)
    windows = {}
    for user, length in enumerate(dataset.lengths):
        ends = np.arange(1, length)
        windows[user] = (
            ends,
            prefix_batch(
                dataset,
                np.full(len(ends), user, np.int64),
                ends,
                width=batches.max_length,
                max_length=batches.max_length,
                convention=batches.convention,
            ),
        )
    for batch in epoch_of(batches, 0):
        # A user's window of a given length may end anywhere once it is cut: find the target.
        width = batch["items"].shape[1]
        for row, user in enumerate(batch["users"]):
            ends, candidates = windows[user]
            assert any(
                (candidates["items"][i, :width] == batch["items"][row]).all()
                and (candidates["gaps"][i] == batch["gaps"][row]).all()
                and candidates["targets"][i] == batch["targets"][row]
                and candidates["lengths"][i] == batch["lengths"][row]
                for i in range(len(ends))
            )


def dataset_and_arguments(**changes):
    dataset = in_memory(random_histories(range(1, 33)))
    arguments = {"max_length": 30, "batch_size": 16, "seed": 7, "convention": "recbole"}
    return dataset, arguments | changes


def test_a_batch_depends_on_seed_and_number_alone():
    dataset, arguments = dataset_and_arguments()
    batches, again = TrainBatches(dataset, **arguments), TrainBatches(dataset, **arguments)
    numbers = range(3 * batches.batches_per_epoch)
    made = [batches[number] for number in numbers]
    for number in reversed(numbers):
        assert_equal(made[number], again[number])


def test_seeds_and_epochs_shuffle_differently():
    dataset, arguments = dataset_and_arguments()
    batches = TrainBatches(dataset, **arguments)
    other = TrainBatches(dataset, **arguments | {"seed": 8})
    orders = {
        tuple(sample for batch in epoch for sample in samples_of(batch))
        for epoch in (epoch_of(batches, 0), epoch_of(batches, 1), epoch_of(other, 0))
    }
    assert len(orders) == 3
    widths = {tuple(b["items"].shape[1] for b in epoch_of(batches, epoch)) for epoch in range(5)}
    assert len(widths) == 5  # the order of buckets is shuffled too


@pytest.mark.parametrize("processes", [1, 2, 4, 16])
def test_processes_share_each_batch(processes):
    dataset, arguments = dataset_and_arguments()
    whole = TrainBatches(dataset, **arguments)
    shares = [
        TrainBatches(dataset, **arguments, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    assert {share.batches_per_epoch for share in shares} == {whole.batches_per_epoch}
    for number in range(whole.batches_per_epoch + 1):
        parts = [share[number] for share in shares]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert_equal(joined, whole[number])


def test_buckets_save_padding():
    dataset, arguments = dataset_and_arguments()
    alike = TrainBatches(dataset, **arguments, buckets=(30,))
    bucketed = TrainBatches(dataset, **arguments)
    assert bucketed.n_targets == alike.n_targets
    assert bucketed.padding_share < 0.5 * alike.padding_share


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "a batch size of 0"),
        ({"batch_size": 6, "process_count": 4}, "6 cannot be shared by 4 processes"),
        ({"max_length": 0}, "a maximum length of 0"),
        ({"buckets": ()}, r"buckets \(\) must be"),
        ({"buckets": (0, 30)}, r"buckets \(0, 30\) must be"),
        ({"buckets": (8, 16)}, r"buckets \(8, 16\) must be positive and the longest 30"),
        ({"buckets": (8, 40)}, r"buckets \(8, 40\) must be"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes, message):
    dataset, arguments = dataset_and_arguments(**changes)
    with pytest.raises(UserError, match=message):
        TrainBatches(dataset, **arguments)


@given(plan=plans(), split=st.sampled_from(["valid", "test"]))
def test_evaluation_covers_each_user_once(plan, split):
    dataset, arguments = realise(**plan)
    arguments.pop("seed")
    last = 1 if split == "test" else 2
    batches = EvalBatches(dataset, split, **arguments)
    made = list(batches)
    assert len(made) == len(batches) == -(-batches.n_targets // arguments["batch_size"])
    found = [sample for batch in made for sample in samples_of(batch)]
    ends = dataset.lengths - last
    targets = dataset.items(dataset.offsets[:-1] + ends.clip(0), np.ones_like(ends), 1)[:, 0]
    assert sorted(found) == [
        (user, targets[user], min(end, batches.max_length))
        for user, end in enumerate(ends)
        if end >= 1
    ]
    assert {batch["items"].shape for batch in made} <= {
        (arguments["batch_size"], width) for width in batches.buckets
    }


def test_a_sample_of_the_users_is_drawn_by_its_seed():
    """If all seeds drew the same users, a validation on a sample would always judge by them."""
    dataset, arguments = dataset_and_arguments(batch_size=4)
    del arguments["seed"]

    def drawn(sample):
        batches = EvalBatches(dataset, "valid", sample=sample, **arguments)
        found = [row for batch in batches for row in samples_of(batch)]
        assert batches.n_targets == len(found)
        return set(found)

    samples = [drawn((10, seed)) for seed in range(3)]
    assert all(len(sample) == 10 and sample < drawn(None) for sample in samples)
    assert samples[0] != samples[1] != samples[2] != samples[0]
    assert drawn((10, 0)) == samples[0] and drawn((100, 0)) == drawn(None)


def test_short_histories_do_what_they_can():
    """Three events: valid and test; two: test; one: nothing."""
    dataset = in_memory(random_histories([1, 2, 3]))
    arguments = {"max_length": 5, "batch_size": 2, "convention": "exact"}
    for split, users in (("valid", [2]), ("test", [1, 2])):
        made = EvalBatches(dataset, split, **arguments)
        assert [user for batch in made for user, *_ in samples_of(batch)] == users
    with pytest.raises(UserError, match="no user has the 4 events"):
        TrainBatches(dataset, seed=0, **arguments)
    with pytest.raises(UserError, match="no user has events enough for the valid split"):
        EvalBatches(in_memory(random_histories([1, 2])), "valid", **arguments)
