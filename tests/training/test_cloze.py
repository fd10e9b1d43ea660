"""The objective cloze: what is masked, what counts, what a step makes of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tests.training.test_step import check_close
from tim4rec_jax.data import TrainBatches
from tim4rec_jax.layers import row_seeds
from tim4rec_jax.models import build
from tim4rec_jax.training.objectives import cloze_loss, mask_batch
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import StepSettings, loss_and_gradients, train_step

LENGTH, ITEMS = 20, 30
mask = jax.jit(
    lambda graph, params, batch, key: mask_batch(nnx.merge(graph, params), batch, key),
    static_argnums=0,
)
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def bert4rec(**settings) -> Any:
    small = dict(hidden_size=16, inner_size=32, n_layers=1) | settings
    config = {"name": "bert4rec", **small}
    return build(config, n_items=ITEMS, max_length=LENGTH)


@pytest.fixture(scope="module")
def batch():
    dataset = in_memory(random_histories([30, 18, 5, 9]))
    batches = TrainBatches(
        dataset, max_length=LENGTH, batch_size=64, seed=0, convention="exact", buckets=[LENGTH]
    )
    batch = batches[0]
    assert 0 < batch["weights"].sum() < 64  # rows that complete the batch are there
    keep = ("items", "lengths", "gaps", "targets", "weights")
    return jax.device_put({name: batch[name] for name in keep})


def targets_of(masked):
    """(row, position, item) of everything that counts."""
    rows, slots = np.nonzero(np.asarray(masked["weights"]))
    positions, targets = np.asarray(masked["positions"]), np.asarray(masked["targets"])
    return {(r, int(positions[r, s]), int(targets[r, s])) for r, s in zip(rows, slots, strict=True)}


def test_only_the_last_items(batch):
    masked = mask(*nnx.split(bert4rec(ft_ratio=1.0)), batch, jax.random.key(0))
    items, ends = np.asarray(batch["items"]), np.asarray(batch["lengths"]) - 1
    real = np.flatnonzero(np.asarray(batch["weights"]))
    assert targets_of(masked) == {(r, ends[r], items[r, ends[r]]) for r in real if ends[r] > 0}
    changed = np.argwhere(masked["items"] != items)
    np.testing.assert_array_equal(changed[:, 1], ends)
    assert np.all(masked["items"][np.arange(64), ends] == ITEMS + 1)


def test_each_item_with_its_chance_and_the_last_masked_ones_as_targets(batch):
    model = nnx.split(bert4rec(ft_ratio=0.0, mask_ratio=0.2))
    items = np.asarray(batch["items"])
    share, cut = [], 0
    for seed in range(20):
        masked = mask(*model, batch, jax.random.key(seed))
        hidden = np.asarray(masked["items"]) == ITEMS + 1
        assert not np.any(hidden & (items == 0))
        np.testing.assert_array_equal(np.where(hidden, 0, masked["items"]), items * ~hidden)
        share.append(hidden.sum() / (items > 0).sum())
        expected = set()
        for row in np.flatnonzero(np.asarray(batch["weights"])):
            places = np.flatnonzero(hidden[row])
            cut += len(places) > 4
            expected |= {(row, p, items[row, p]) for p in places[-4:] if p > 0}
        assert targets_of(masked) == expected
    assert abs(np.mean(share) - 0.2) < 0.01
    assert cut > 20


def test_one_draw_decides_for_the_whole_batch(batch):
    model, ends = nnx.split(bert4rec(ft_ratio=0.5)), np.asarray(batch["lengths"]) - 1
    last_only = []
    for seed in range(40):
        hidden = np.asarray(mask(*model, batch, jax.random.key(seed))["items"]) == ITEMS + 1
        last_only.append(hidden.sum() == 64 and np.all(hidden[np.arange(64), ends]))
    assert 10 <= sum(last_only) <= 30


def test_the_loss_is_the_mean_over_all_targets_however_the_batch_is_cut(batch):
    graph, params = nnx.split(bert4rec())
    masked = mask(*nnx.split(bert4rec(ft_ratio=0.0)), batch, jax.random.key(1))
    parts = quick_jit(loss_and_gradients, static_argnames=("graphdef", "microbatches", "objective"))
    seeds = row_seeds(jax.random.key(2), 64)
    whole, cut = (parts(graph, params, masked, seeds, m, objective="cloze") for m in (1, 4))
    check_close(cut, whole, 3e-6)

    @quick_jit
    def sums(params, masked):
        """The objective's, and one target after the other from what is said at all places."""
        model: Any = nnx.merge(graph, params)
        scores = model(masked["items"], masked["lengths"], masked["gaps"]) @ model.item_table().T
        scores = jax.nn.log_softmax(scores)
        rows = jnp.arange(64)[:, None]
        return (
            cloze_loss(model, masked, seeds),
            cloze_loss(model, masked, None),
            -jnp.sum(masked["weights"] * scores[rows, masked["positions"], masked["targets"]]),
        )

    with_dropout, without, expected = map(float, sums(params, masked))
    assert without == pytest.approx(expected, rel=1e-5)
    count = float(masked["weights"].sum())
    assert float(whole[0]) == pytest.approx(with_dropout / count, rel=1e-5)


def test_a_batch_without_a_target_changes_no_weight_and_later_ones_do(batch):
    graph, params = nnx.split(bert4rec())
    tx = make_optimizer(0.01, 0.0)
    state = init_state(params, tx, 0)
    settings = StepSettings(graph, tx, "cloze")
    before = jax.tree.map(np.array, state.params)
    single = jnp.zeros_like(batch["items"]).at[:, 0].set(batch["items"][:, 0])
    lone = batch | {"items": single, "lengths": jnp.ones_like(batch["lengths"])}
    state, metrics = train_step(state, lone, settings)
    assert (float(metrics["loss"]), int(metrics["bad_step"])) == (0.0, -1)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state.params), before)
    losses = []
    for _ in range(60):
        state, metrics = train_step(state, batch, settings)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert int(metrics["bad_step"]) == -1
