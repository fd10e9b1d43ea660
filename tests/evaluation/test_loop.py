import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import in_memory, random_histories
from tests.evaluation.fake_model import MeanModel
from tim4rec_jax.data import EvalBatches
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate, metrics

LENGTHS = [*range(1, 14), 30, 2]
SETTINGS = dict(max_length=6, batch_size=8, convention="exact", buckets=(4, 6))


@pytest.fixture(scope="module")
def dataset():
    return in_memory(random_histories(LENGTHS))


@pytest.fixture(scope="module")
def model():
    return MeanModel(30)


def naive_rank(model, items, timestamps, end, exclude_seen, offset=0.0):
    window = slice(max(end - 6, 0), end)
    gaps = np.diff(timestamps[window], prepend=timestamps[window.start])
    table = np.asarray(model.item_embedding.embedding[...], np.float64)
    hidden = table[items[window]].mean(0) + 0.01 * np.log1p(gaps[-1])
    scores = table @ hidden
    scores[np.unique(items[:end])] += offset
    rivals = set(range(1, 31)) - {items[end]} - (set(items[:end]) if exclude_seen else set())
    return 1 + sum(scores[item] > scores[items[end]] for item in rivals)


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize(("split", "back"), [("valid", 2), ("test", 1)])
def test_ranks_of_every_user(dataset, model, split, back, exclude_seen):
    expected = [
        0 if length <= back else naive_rank(model, *history, length - back, exclude_seen)
        for length, history in zip(LENGTHS, random_histories(LENGTHS), strict=True)
    ]
    figures, found = evaluate(model, dataset, split, exclude_seen=exclude_seen, **SETTINGS)
    np.testing.assert_array_equal(found, expected)
    assert figures == metrics(found[found > 0])


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_all_items_of_the_history_are_offset(dataset, exclude_seen):
    model = MeanModel(30)
    model.offset = nnx.Param(jnp.asarray(-0.02))
    offset = float(model.repeat_bias())
    ranks = [
        [
            naive_rank(model, *history, len(history[0]) - 1, exclude_seen, added)
            for added in (offset, 0)
        ]
        for history in random_histories(LENGTHS)
        if len(history[0]) > 1
    ]
    expected, without = zip(*ranks, strict=True)
    assert expected != without
    _, found = evaluate(model, dataset, "test", exclude_seen=exclude_seen, **SETTINGS)
    np.testing.assert_array_equal(found[found > 0], expected)


def test_devices_share_the_batches(dataset, model, all_devices):
    assert len(jax.local_devices()) == 8
    figures, found = evaluate(model, dataset, "test", **SETTINGS)
    for batch_size in (3, 4, 16):  # 1, 4 and 8 devices
        settings = SETTINGS | {"batch_size": batch_size}
        again, ranks = evaluate(model, dataset, "test", **settings)
        np.testing.assert_array_equal(ranks, found)
        assert again == figures


def test_compiles_once_per_shape(dataset, model):
    settings = SETTINGS | {"max_length": 5, "batch_size": 4, "buckets": (3, 5)}
    before = MeanModel.traces
    first, _ = evaluate(model, dataset, "test", **settings)
    assert MeanModel.traces - before == 2
    other = MeanModel(30, seed=1)
    second, _ = evaluate(other, dataset, "test", **settings)
    assert MeanModel.traces - before == 2
    assert first != second  # weights are no constants of the compiled code


def test_many_batches_keep_their_users(dataset, model):
    """More batches than may be in flight."""
    _, expected = evaluate(model, dataset, "test", **SETTINGS)
    settings = SETTINGS | {"batch_size": 1}
    assert len(EvalBatches(dataset, "test", **settings)) > 10
    _, found = evaluate(model, dataset, "test", **settings)
    np.testing.assert_array_equal(found, expected)


def test_nobody_to_evaluate(model):
    with pytest.raises(UserError, match="no user"):
        evaluate(model, in_memory(random_histories([1, 1])), "test", **SETTINGS)
