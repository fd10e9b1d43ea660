"""The study of the causal model: what it adds is zero at first, and then counts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.causal_time import CANDIDATES, in_use
from tests.models.small_models import small_model
from tim4rec_jax.models import build
from tim4rec_jax.training import train as training
from tim4rec_jax.training.losses import Loss

SETTINGS = {
    "name": "tim4rec",
    "time_encoding": "causal",
    "hidden_size": 8,
    "head_dim": 8,
    "d_state": 2,
    "num_layers": 1,
}
SIZES: dict[str, Any] = dict(n_items=9, max_length=6)


ADDED = ("as it is", "gap: networks", "gates", "bands")


@pytest.mark.slow
def test_a_candidate_begins_by_changing_nothing():
    items = np.array([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]], np.int32)
    gaps = np.array([[0, 60, 7, 86400, 1, 5], [0, 3, 0, 9, 4000, 2]], np.float32)
    segments = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.int32)
    lengths = np.array([6, 4], np.int32)
    _, shared = small_model(SETTINGS, spread=0.3, **SIZES)
    kernel = shared["blocks"][0]["modulator"]["kernel"]  # networks have no such values
    kernel[...] = np.zeros_like(kernel[...])

    def outputs(name, shared, items, lengths, gaps, segments):
        """Of the fresh candidate with the parameters it shares, and with all of it moved."""
        added = CANDIDATES[name].settings.items()
        changes = {key.removeprefix("model."): value for key, value in added}
        with in_use(CANDIDATES[name]):
            model = build(SETTINGS | changes, **SIZES)
        nnx.update(model, shared)
        for moved in (0.0, 0.3):
            graph, state = nnx.split(model)
            model = nnx.merge(graph, jax.tree.map(lambda x, moved=moved: x + moved, state))
            yield (
                model(items, lengths, gaps),
                model(items, lengths, gaps, segment_ids=segments),
                model.encode(items, lengths, gaps),
            )

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def every(*inputs):
        return {name: tuple(outputs(name, *inputs)) for name in ADDED}

    found = every(shared, items, lengths, gaps, segments)
    plain, plain_moved = found["as it is"]
    for name in ADDED[1:]:
        fresh, moved = found[name]
        for ours, expected in zip(fresh, plain, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5, err_msg=name)
        whole, packed, encoded = moved
        assert np.abs(whole - plain_moved[0]).max() > 1e-3, name
        at_last = whole[np.arange(2), lengths - 1]
        np.testing.assert_allclose(encoded, at_last, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(packed[:, :3], whole[:, :3], atol=1e-4, err_msg=name)
        assert np.abs(packed[0, 3:] - whole[0, 3:]).max() > 1e-3, name


def test_the_smoothed_loss_is_that_of_smooth_targets():
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(3, 4)), rng.normal(size=(6, 4))
    targets, weights = np.array([1, 5, 2]), np.array([1.0, 0.0, 2.0])
    with in_use(CANDIDATES["label smoothing .1"]):
        loss = Loss().prepare(jax.random.key(0), 5, None)
        found = loss(*map(jnp.asarray, (hidden, table, targets, weights)))
    scores = hidden @ table.T
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    smooth = np.full((3, 6), 0.1 / 5)
    smooth[:, 0] = 0
    smooth[np.arange(3), targets] += 0.9
    assert found == pytest.approx(-np.sum(weights[:, None] * smooth * logs), rel=1e-5)


def test_averaged_weights_are_a_mean_of_the_epochs_that_is_ranked(monkeypatch):
    ranked = []
    monkeypatch.setattr(training, "evaluate", lambda model, *_: ranked.append(model.kernel[...]))
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    with in_use(CANDIDATES["averaged weights"]):
        for value in (1.0, 2.0, 4.0):
            model.kernel[...] = jnp.full((2, 1), value)
            training.evaluate(model, None, "valid")
    assert [float(each[0, 0]) for each in ranked] == pytest.approx([1.0, 1.3, 2.11])
    assert float(model.kernel[0, 0]) == 4.0  # the training goes on with its own
