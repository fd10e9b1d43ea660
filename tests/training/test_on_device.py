"""Batches gathered on the device are the host's; a training on them is the host's too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories, write_dataset
from tests.training.test_step import ROUNDING, check_close, sgd
from tests.training.tiny_run import last_item, quick_config
from tim4rec_jax import config as config_lib
from tim4rec_jax.data import PackedBatches, TrainBatches, open_dataset
from tim4rec_jax.runtime import data_sharding
from tim4rec_jax.training import dispatch
from tim4rec_jax.training.dispatch import (
    DeviceSteps,
    Gather,
    HostSteps,
    choose_placement,
    make_steps,
)
from tim4rec_jax.training.inputs import make_batches
from tim4rec_jax.training.state import init_state

HISTORIES = random_histories([9, 4, 30, 12, 2, 5, 21])


def gather_of(batches, convention):
    packed = isinstance(batches, PackedBatches)
    return Gather(packed, batches.max_length, convention, tuple(batches[0]))


@pytest.mark.parametrize("convention", ["recbole", "exact"])
def test_prefix_batches_are_those_of_the_host(convention):
    dataset = in_memory(HISTORIES, splits=(2, 5))
    batches = TrainBatches(
        dataset, max_length=10, batch_size=8, seed=0, convention=convention, buckets=(4, 10)
    )
    log, gather = dataset.all_events(), gather_of(batches, convention)
    gathered = jax.jit(gather.batch, static_argnums=2)
    widths = set()
    for number in range(batches.batches_per_epoch):
        expected, indices = batches[number], batches.indices(number)
        width = batches.buckets[indices.pop("bucket")]
        batch = gathered(log, indices, width)
        widths.add(width)
        assert batch.keys() == expected.keys()
        for name in expected:
            assert batch[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)
    assert widths == {4, 10}


def test_packed_batches_are_those_of_the_host():
    dataset = in_memory(HISTORIES, splits=(2, 5))
    batches = PackedBatches(dataset, max_length=8, batch_size=3, seed=0)
    log, gather = dataset.all_events(), gather_of(batches, "exact")
    gathered = jax.jit(gather.batch, static_argnums=2)
    for number in range(2 * batches.batches_per_epoch):
        expected, indices = batches[number], batches.indices(number)
        indices.pop("bucket")
        batch = gathered(log, indices, 8)
        assert batch.keys() == expected.keys()
        for name in expected:
            assert batch[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    histories = random_histories([14] * 40)
    return write_dataset(tmp_path_factory.mktemp("data") / "random", histories)


@pytest.mark.parametrize("objective", ["prefix", "every_position"])
def test_steps_are_those_of_the_host_and_resume_in_the_same_bits(dataset, monkeypatch, objective):
    # Not Adam: it would blow up the rounding of gradients that are all but zero.
    monkeypatch.setattr(dispatch, "make_optimizer", lambda *_: sgd())
    config = quick_config(
        dataset, objective=objective, batch_size=16 if objective == "prefix" else 4
    )
    ds, placement = open_dataset(dataset), data_sharding(1)
    settings = dict(max_length=12, batch_size=config.train.batch_size, seed=0)
    batches = PackedBatches(ds, **settings)
    if objective == "prefix":
        batches = TrainBatches(ds, convention="exact", buckets=(6, 12), **settings)
    model = last_item(ds.n_items)

    def trained(where, stop=()):
        """Parameters after seven steps, going on from a saved state after the steps in `stop`."""
        config.data.placement = where
        steps = make_steps(config_lib.resolve(config), batches, model, placement)
        state = init_state(nnx.state(model, nnx.Param), steps.settings.tx, 0)
        state = jax.tree.map(jnp.copy, state)  # the first step donates it
        for done in range(7):
            if done in stop:
                saved = steps.iterator.get_state()
                steps = make_steps(config_lib.resolve(config), batches, model, placement)
                steps.iterator.set_state(saved)
            state, _ = steps.run(state)
        return steps, jax.tree.leaves(nnx.to_pure_dict(state.params))

    _, host = trained("host")
    steps, device = trained("device")
    assert isinstance(steps, DeviceSteps)
    # The programs are not the same, and round otherwise.
    check_close(device, host, ROUNDING)
    _, resumed = trained("device", stop=(3, 6))
    for ours, theirs in zip(device, resumed, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    # A program for each width, and nothing in it at which a GPU would have to ask the host.
    state = init_state(nnx.state(model, nnx.Param), steps.settings.tx, 0)
    texts = [lowered.as_text() for lowered in steps.lowered(state)]
    assert len(texts) == len(batches.buckets)
    for text in texts:
        assert "stablehlo.case" not in text


@pytest.mark.parametrize(("shuffled", "kind"), [(False, DeviceSteps), (True, HostSteps)])
def test_the_host_gathers_where_events_of_one_moment_are_shuffled(shuffled, kind, monkeypatch):
    """A GPU has the events in one order, and would leave the setting without an effect."""
    monkeypatch.setattr(dispatch, "choose_placement", lambda asked, _: asked.replace("auto", "gpu"))
    config = quick_config("none", objective="every_position", batch_size=4)
    config.data.shuffle_ties = shuffled
    batches = make_batches(config, in_memory(HISTORIES))
    steps = make_steps(config_lib.resolve(config), batches, last_item(), data_sharding(1))
    assert type(steps) is kind


def test_a_cpu_keeps_batches_on_the_host():
    dataset = in_memory(HISTORIES)
    assert choose_placement("auto", dataset) == "host"
    assert choose_placement("device", dataset) == "device"
