"""Batches gathered on the device are the host's; a training on them is the host's too."""

import jax
import numpy as np
import pytest

from tests.data.small_dataset import in_memory, random_histories, write_dataset
from tests.training.tiny_run import die_at, parameters, tiny_config
from tim4rec_jax import config as config_lib
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.training import steps
from tim4rec_jax.training.loop import train
from tim4rec_jax.training.on_device import choose_placement, event_log, layout

HISTORIES = random_histories([9, 4, 30, 12, 2, 5, 21])


@pytest.mark.parametrize("convention", ["recbole", "exact"])
def test_prefix_batches_are_those_of_the_host(convention):
    dataset = in_memory(HISTORIES, splits=(2, 5))
    batches = TrainBatches(
        dataset, max_length=10, batch_size=8, seed=0, convention=convention, buckets=(4, 10)
    )
    log, gather = event_log(dataset, convention), layout(batches, convention, 1)
    widths = set()
    for number in range(batches.batches_per_epoch):
        expected, rows = batches[number], batches.rows(number)
        width = batches.buckets[rows.pop("bucket")]
        batch = gather.batch(*jax.tree.map(jax.numpy.asarray, (log, rows)), width)
        widths.add(width)
        assert batch.keys() == expected.keys()
        for name in expected.keys() - ({"waits"} if convention == "recbole" else set()):
            assert batch[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)
    assert widths == {4, 10}


def test_packed_batches_are_those_of_the_host():
    dataset = in_memory(HISTORIES, splits=(2, 5))
    batches = PackedBatches(dataset, max_length=8, batch_size=3, seed=0)
    log, gather = event_log(dataset, "exact"), layout(batches, "exact", 1)
    for number in range(2 * batches.batches_per_epoch):
        expected, rows = batches[number], batches.rows(number)
        rows.pop("bucket")
        batch = gather.batch(*jax.tree.map(jax.numpy.asarray, (log, rows)), 8)
        assert batch.keys() == expected.keys()
        real = expected["weights"] > 0
        for name in expected.keys() - {"segment_ids"}:
            np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)
        ours, theirs = (np.diff(b["segment_ids"], axis=1) != 0 for b in (batch, expected))
        np.testing.assert_array_equal(ours[real[:, 1:]], theirs[real[:, 1:]])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    histories = random_histories([14] * 40)
    return write_dataset(tmp_path_factory.mktemp("data") / "random", histories)


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_is_that_of_the_host_and_resumes_in_the_same_bits(
    dataset, tmp_path, monkeypatch, packed
):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(steps, "STEPS", 4)
    config = tiny_config(dataset)
    config.data.buckets = (6, 12)
    if packed:
        config_lib.use_causal_time(config, rows=4, epochs=2)
    config.train.checkpoint_minutes = 1e-9  # a checkpoint after every dispatch
    host = train(config, tmp_path / "host")
    config.data.placement = "device"
    device = train(config, tmp_path / "device")
    pairs = [parameters(tmp_path / name) for name in ("host", "device")]
    # Programs for several steps round otherwise than those for one.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *pairs)
    assert device["valid"]["ndcg@50"] == pytest.approx(host["valid"]["ndcg@50"], abs=0.02)

    die_at(7, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "hit")
    train(config, tmp_path / "hit")
    pairs = [parameters(tmp_path / name) for name in ("device", "hit")]
    jax.tree.map(np.testing.assert_array_equal, *pairs)


def test_a_cpu_keeps_batches_on_the_host():
    dataset = in_memory(HISTORIES)
    assert choose_placement("auto", dataset) == "host"
    assert choose_placement("device", dataset) == "device"
