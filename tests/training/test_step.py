"""The training step: splitting a batch over time or devices changes nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.data.small_dataset import in_memory, random_histories
from tests.training.tiny_run import MAX_LENGTH, last_item, tiny_config
from tim4rec_jax.data import PackedBatches, TrainBatches
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.models import build
from tim4rec_jax.runtime import data_sharding
from tim4rec_jax.training.dispatch import make_steps
from tim4rec_jax.training.losses import Loss
from tim4rec_jax.training.negatives import item_frequencies
from tim4rec_jax.training.objectives import OBJECTIVES, Objective, prefix_loss
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import StepSettings, loss_and_gradients, num_microbatches, train_step

slow = pytest.mark.slow
ROWS = 16
# A gradient is a sum over all positions of a batch. In another order of summation, each addition
# may round otherwise: by 2^-24 of the sum of the magnitudes. The smallest fault, a row that counts
# twice or not at all, would change the sum by a sixteenth.
ROUNDING = ROWS * MAX_LENGTH * 2**-24
SEEDS = row_seeds(jax.random.key(3), ROWS)
gradients_in_parts = jax.jit(
    loss_and_gradients, static_argnames=("graphdef", "microbatches", "objective")
)


def tim4rec(**settings):
    config = tiny_config("none").model
    config.update(settings)
    return nnx.split(build(config, n_items=30, max_length=MAX_LENGTH))


# A step treats all models alike: one that compiles quickly shows every fault of the step.
@pytest.fixture(scope="module", params=["last item", pytest.param("TiM4Rec", marks=slow)])
def model(request):
    if request.param == "last item":
        return nnx.split(last_item())
    return tim4rec(dropout_prob=0.3, time_drop_out=0.3)


@pytest.fixture(scope="module")
def batches():
    dataset = in_memory(random_histories([20] * 6))
    batches = TrainBatches(
        dataset, max_length=MAX_LENGTH, batch_size=ROWS, seed=0, convention="recbole", buckets=[12]
    )
    keep = ("items", "lengths", "gaps", "targets", "weights")
    return [{name: batches[number][name] for name in keep} for number in range(4)]


def check_close(ours, theirs, tolerance):
    """Norm by norm: single elements may be sums that cancel."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        limit = tolerance * np.linalg.norm(b) + 1e-12
        assert np.linalg.norm(a - b) <= limit, (a.shape, np.abs(a - b))


def test_micro_batches_give_loss_and_gradients_of_the_whole(model, batches):
    whole = gradients_in_parts(*model, batches[0], SEEDS, microbatches=1)
    parts = gradients_in_parts(*model, batches[0], SEEDS, microbatches=4)
    check_close(parts, whole, ROUNDING)
    # Dropout was on, or its masks would not have been tested.
    others = gradients_in_parts(*model, batches[0], SEEDS + jnp.uint32(1), microbatches=1)
    assert abs(others[0] - whole[0]) > 1e-4


@pytest.mark.parametrize("name", ["last item", pytest.param("TiM4Rec", marks=slow)])
def test_micro_batches_of_packed_rows(name):
    model = nnx.split(last_item())
    if name == "TiM4Rec":
        model = tim4rec(time_encoding="causal", dropout_prob=0.3)
    dataset = in_memory(random_histories([20] * 6))
    batch = jax.device_put(PackedBatches(dataset, max_length=MAX_LENGTH, batch_size=8, seed=0)[0])
    settings = dict(objective="every_position")
    whole = gradients_in_parts(*model, batch, SEEDS[:8], microbatches=1, **settings)
    parts = gradients_in_parts(*model, batch, SEEDS[:8], microbatches=4, **settings)
    check_close(parts, whole, ROUNDING)


def test_the_cosine_falls_to_nothing():
    tx = make_optimizer(0.1, 0.0, 10)
    params, sizes = jnp.ones(3), []
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(11):
        updates, state = update(jnp.ones(3), state, params)
        sizes.append(float(jnp.abs(updates).max()))
    np.testing.assert_allclose(sizes, 0.05 * (1 + np.cos(np.pi * np.arange(11) / 10)), atol=1e-6)


def test_the_cosine_ends_with_the_last_epoch():
    config = tiny_config("none", schedule="cosine", epochs=3, batch_size=ROWS)
    dataset = in_memory(random_histories([20] * 6))
    batches = TrainBatches(
        dataset, max_length=MAX_LENGTH, batch_size=ROWS, seed=0, convention="recbole", buckets=[12]
    )
    tx = make_steps(config, batches, last_item(), data_sharding(ROWS)).settings.tx
    update, sizes, state = jax.jit(tx.update), [], tx.init(jnp.ones(1))
    for _ in range(3 * batches.batches_per_epoch + 1):
        change, state = update(jnp.ones(1), state, jnp.ones(1))
        sizes.append(abs(float(change[0])))
    assert sizes[-1] == 0 < sizes[-2]


def test_negatives_are_drawn_by_the_events_of_the_training():
    """If those of the test counted too, training would know which items will be wanted."""
    dataset = in_memory([(np.array([1, 2, 1, 2, 2, 30], np.int32), np.arange(6))] * 4)
    config = tiny_config("none", loss="sampled_softmax", batch_size=ROWS)
    batches = TrainBatches(
        dataset, max_length=MAX_LENGTH, batch_size=ROWS, seed=0, convention="recbole"
    )
    found = make_steps(config, batches, last_item(), data_sharding(ROWS))._cumulative
    rises = np.diff(np.asarray(found.within)[:31, 1].astype(int))
    expected = np.ones(30, int)  # one is added to each
    expected[:2] += 8
    np.testing.assert_array_equal(rises, expected)


def test_filler_rows_change_nothing(model, batches):
    weights = np.where(np.arange(ROWS) < 11, 1, 0).astype(np.float32)
    batch = batches[0] | {"weights": weights}
    other = (
        {  # the same real rows, other filler
            name: np.concatenate([batch[name][:11], batches[1][name][11:]]) for name in batch
        }
        | {"weights": weights}
    )
    loss, gradients = gradients_in_parts(*model, batch, SEEDS, microbatches=1)
    same = gradients_in_parts(*model, other, SEEDS, microbatches=1)
    jax.tree.map(np.testing.assert_array_equal, same, (loss, gradients))
    single = [
        gradients_in_parts(*model, batch | {"weights": np.eye(ROWS)[i]}, SEEDS, microbatches=1)[0]
        for i in range(11)
    ]
    assert np.ptp(single) > 1e-3
    assert loss == pytest.approx(np.mean(single), rel=1e-6)


@functools.cache  # compiled steps are found by the identity of the optimizer
def sgd():
    # Not Adam: it would blow up the rounding of gradients that are all but zero.
    return optax.sgd(0.3, momentum=0.9)


def new_state(model, tx):
    _, params = model
    return init_state(jax.tree.map(jnp.copy, params), tx, seed=5)


def train(model, batches, tx, devices=1, micro=1):
    graphdef, _ = model
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("batch",))
    state = jax.device_put(new_state(model, tx), NamedSharding(mesh, PartitionSpec()))
    losses = []
    for batch in batches:
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch")))
        state, metrics = train_step(
            state, batch, StepSettings(graphdef, tx, num_microbatches=micro)
        )
        losses.append(float(metrics["loss"]))
    return state, losses


def test_eight_devices_give_the_parameters_of_one(model, batches):
    one, losses = train(model, batches, sgd())
    assert len(jax.devices()) == 8
    eight, same_losses = train(model, batches, sgd(), devices=8, micro=2)
    for leaf in jax.tree.leaves(eight.params):
        assert len(leaf.sharding.device_set) == 8
    check_close(eight.params, one.params, ROUNDING)
    np.testing.assert_allclose(same_losses, losses, rtol=ROUNDING)


def test_the_loss_of_the_epoch_is_the_mean_of_its_rows(model, batches):
    light = batches[1] | {"weights": np.eye(ROWS, dtype=np.float32)[0]}
    graphdef, _ = model
    state, expected = new_state(model, sgd()), []
    for batch in (batches[0], light):
        seeds = row_seeds(jax.random.fold_in(state.rng, state.step), ROWS)
        loss, _ = gradients_in_parts(graphdef, state.params, batch, seeds, microbatches=1)
        expected.append((float(loss), batch["weights"].sum()))
        state, metrics = train_step(state, batch, StepSettings(graphdef, sgd()))
    losses, weights = zip(*expected, strict=True)
    assert weights == (16, 1)
    assert float(metrics["loss"]) == pytest.approx(np.average(losses, weights=weights), rel=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_ever_after(model, batches):
    graphdef, _ = model
    broken = batches[1] | {"gaps": np.full_like(batches[1]["gaps"], np.nan)}
    state, _ = train_step(new_state(model, sgd()), batches[0], StepSettings(graphdef, sgd()))
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    for step, batch in enumerate((broken, batches[2]), 1):
        state, metrics = train_step(state, batch, StepSettings(graphdef, sgd()))
        assert (int(metrics["bad_step"]), int(state.step)) == (1, step + 1)
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)


@pytest.mark.parametrize("loss", ["gbce", "sampled_softmax"])
def test_every_step_draws_anew(loss, batches, monkeypatch):
    """With the same negatives or masks in every step, training would see no others."""

    def prepare(model, batch, key):
        return batch | {"weights": jax.random.uniform(key, (ROWS,))}

    monkeypatch.setitem(OBJECTIVES, "drawn", Objective(prefix_loss, prepare))
    settings = dict(objective="drawn", loss=Loss(loss, negatives=8), num_microbatches=1)
    model = nnx.split(last_item(n_items=200))
    settings = StepSettings(model[0], sgd(), **settings)
    frequencies = jax.device_put(item_frequencies(np.ones(200, int)))
    before, found = np.asarray(model[1]["item_embedding"]["embedding"][...]), []
    for number in (0, 1, 1):
        state = new_state(model, sgd()).replace(step=jnp.int32(number))
        state, _ = train_step(state, batches[0], settings, frequencies)
        after = np.asarray(state.params["item_embedding"]["embedding"][...])
        negatives = np.flatnonzero((after != before).any(axis=1)[31:])  # no item of the batch
        assert 0 < len(negatives) <= 8
        found.append((negatives.tolist(), float(state.weight_sum)))
    first, second, again = found
    assert first[0] != second[0] and first[1] != second[1]
    assert second == again  # a run that goes on draws what it would have drawn


def test_adam_with_the_decay_added_to_the_gradient():
    tx = make_optimizer(0.01, 0.1)
    parameter, state = np.array([2.0, -1.0]), tx.init(jnp.array([2.0, -1.0]))
    update = jax.jit(tx.update)
    mean = square = np.zeros(2)
    for step, gradient in enumerate(([0.5, -0.2], [0.1, 0.4]), 1):
        updates, state = update(jnp.array(gradient), state, jnp.asarray(parameter, jnp.float32))
        total = np.array(gradient) + 0.1 * parameter
        mean, square = 0.9 * mean + 0.1 * total, 0.999 * square + 0.001 * total**2
        scale = np.sqrt(square / (1 - 0.999**step)) + 1e-8
        expected = -0.01 * mean / (1 - 0.9**step) / scale
        np.testing.assert_allclose(updates, expected, rtol=1e-4)
        parameter = parameter + expected


@pytest.mark.parametrize("rows", [1, 7, 48, 256, 2048, 4096])
@pytest.mark.parametrize("length", [8, 50, 200])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_micro_batches_divide_the_rows_of_every_device(rows, length, devices):
    devices = math.gcd(rows, devices)
    count = num_microbatches(rows, length, devices)
    assert rows % (count * devices) == 0
    if count > 1:
        assert rows // count >= 8 * devices
    if rows % 256 == 0:
        assert rows // count <= max(3072 // length, 8 * devices)
    # Each event of a packed row has a row of scores.
    packed = num_microbatches(rows, length, devices, "every_position")
    assert packed >= count
    assert rows % (packed * devices) == 0
    if packed > 1:
        assert rows // packed >= 8 * devices
    if rows % 256 == 0:
        assert rows // packed <= max(512 // length, 8 * devices)
