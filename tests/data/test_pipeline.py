"""The stream that training reads: in order, endless, resumable anywhere."""

import itertools

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.data.small_dataset import in_memory, random_histories
from tim4rec_jax.data import TrainBatches
from tim4rec_jax.data.pipeline import train_iterator


@pytest.fixture(scope="module")
def batches():
    dataset = in_memory(random_histories(range(1, 40)))
    return TrainBatches(dataset, max_length=20, batch_size=32, seed=1, convention="recbole")


def assert_stream(iterator, batches, first, count):
    for number, batch in zip(range(first, first + count), iterator, strict=False):
        expected = batches[number]
        assert batch.keys() == expected.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_come_in_order_over_epochs(batches, threads):
    iterator = train_iterator(batches, threads=threads)
    assert_stream(iterator, batches, 0, 2 * batches.batches_per_epoch + 3)
    iterator.close()


def test_resumes_at_any_batch(batches):
    iterator = train_iterator(batches)
    for number in range(batches.batches_per_epoch + 2):
        state = iterator.get_state()
        assert state == {"next_index": number}
        resumed = train_iterator(batches)
        resumed.set_state(state)
        assert_stream(resumed, batches, number, 2)
        resumed.close()
        next(iterator)
    iterator.close()
    started = train_iterator(batches, start_batch=1000)
    assert_stream(started, batches, 1000, 2)
    started.close()


def test_state_goes_through_an_orbax_checkpoint(batches, tmp_path):
    iterator = train_iterator(batches)
    list(itertools.islice(iterator, 5))
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        next(iterator)
        manager.wait_until_finished()
        restored = train_iterator(batches)
        manager.restore(
            5, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored))
        )
    assert_stream(restored, batches, 5, 3)
    iterator.close()
    restored.close()
