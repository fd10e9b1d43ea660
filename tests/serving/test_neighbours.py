"""What the last events add to scores is the same wherever items are ranked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.serving.conftest import KINDS
from tests.serving.tiny_run import N_ITEMS, save_run, tiny_model
from tim4rec_jax.data import item_neighbours, open_dataset
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.ranking import ranks_and_ties
from tim4rec_jax.layers.neighbours import RECENT
from tim4rec_jax.scoring import history_bias
from tim4rec_jax.serving import export as export_lib
from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.compiled_model import CompiledModel
from tim4rec_jax.serving.explain import explain
from tim4rec_jax.serving.history import read_histories
from tim4rec_jax.serving.recommender import Recommender

KIND = KINDS["causal"] | dict(neighbours=4, neighbour_weight=0.7, repeat_last=True)
OWN = np.linspace(-0.02, 0.03, N_ITEMS + 1).astype(np.float32)  # of each item where it comes last


@pytest.fixture(scope="module")
def with_neighbours(tiny_data):
    """A recommender, its model and its neighbours."""
    config, model = tiny_model(tiny_data, **KIND)
    found = item_neighbours(open_dataset(tiny_data), 4)
    model.neighbours.items[...], model.neighbours.similarity[...] = map(jnp.asarray, found)
    model.last_offset[...] = jnp.asarray(OWN)
    catalogue = Catalogue(tiny_data)
    compiled = CompiledModel(config, model, catalogue.ids)
    return Recommender(compiled, catalogue), model, found


def history(length):
    items = [f"i{1 + (7 * n) % N_ITEMS}" for n in range(length)]
    return items, list(range(880_000_000, 880_000_000 + length))


def naive(recommender, found, items):
    """What is added to the score of each item, by the definition."""
    read = recommender.catalogue.indices(items)
    sums = np.zeros(N_ITEMS + 1)
    for age, item in enumerate(read[::-1][:RECENT]):
        np.add.at(sums, found[0][item], 0.85**age * found[1][item])
    added = 0.7 * np.log1p(10 * sums)
    if len(read) < 2 or read[-1] != read[-2]:
        added[read[-1]] += float(recommender.model.last_bias[read[-1]])
    return added


@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize("twice", [False, True])
def test_recommendations_hold_what_the_last_events_add(with_neighbours, length, twice):
    recommender, _, found = with_neighbours
    items, times = history(length)
    if twice:
        items, times = [*items, items[-1]], [*times, times[-1]]
    added = naive(recommender, found, items)
    events = recommender.recommend(items, times, k=N_ITEMS, exclude_seen=False)
    plain, table, own = recommender.model, recommender.model.neighbours, recommender.model.last_bias
    try:
        plain.neighbours = plain.last_bias = None
        without = recommender.recommend(items, times, k=N_ITEMS, exclude_seen=False)
    finally:
        plain.neighbours, plain.last_bias = table, own
    before = dict(zip(without.items, without.scores, strict=True))
    for item, score in zip(events.items, events.scores, strict=True):
        index = int(recommender.catalogue.indices([item])[0])
        assert score == pytest.approx(before[item] + added[index], abs=2e-5)
    assert added[1:].any()


def test_ranks_are_places_in_the_recommendations(with_neighbours):
    recommender, model, _ = with_neighbours
    items, times = history(5)
    best = recommender.recommend(items, times, k=N_ITEMS, exclude_seen=False)
    read = recommender.catalogue.indices(items).astype(np.int32)
    rows = np.tile(np.append(read, [0, 0, 0]).astype(np.int32), (N_ITEMS, 1))
    events, _ = read_histories([(items, times)], recommender.catalogue, sort=False)
    hidden = np.repeat(np.asarray(recommender.model.encode(events))[:1], N_ITEMS, axis=0)
    places = {item: place for place, item in enumerate(best.items, 1)}
    expected = [places[f"i{n}"] for n in range(1, N_ITEMS + 1)]
    targets = np.arange(1, N_ITEMS + 1, dtype=np.int32)
    marks = history_bias(model).of(rows)
    for block_size in (8, 64):
        ranks, _ = ranks_and_ties(
            hidden, model.item_table(), targets, block_size=block_size, history=marks
        )
        np.testing.assert_array_equal(ranks, expected)


def test_export_and_explanation_agree(with_neighbours):
    recommender, model, _ = with_neighbours
    items, times = history(5)
    best = recommender.recommend(items, times, k=4)
    function, weights = export_lib.program(model, 4)
    assert export_lib.lower(function, weights, model).platforms == ("cpu", "cuda", "tpu")
    read = np.zeros((1, model.max_length), np.int32)
    read[0, :5] = recommender.catalogue.indices(items)
    gaps = np.zeros((1, model.max_length), np.float32)
    gaps[0, 1:5] = 1
    date = np.array([times[-1] / 86_400], np.float32)
    seen = recommender.catalogue.indices(items)[None].astype(np.int32)
    lengths = np.array([5], np.int32)
    scores, found = jax.jit(function)(weights, read, lengths, gaps, seen, date)
    assert [f"i{item}" for item in found[0].tolist()] == best.items
    np.testing.assert_allclose(scores[0], best.scores, atol=2e-4)
    explained = explain(recommender, items, times)
    whole = recommender.recommend(items, times, k=N_ITEMS, exclude_seen=False)
    softmax = np.exp(whole.scores - np.max(whole.scores))
    softmax /= softmax.sum()
    place = whole.items.index(explained.recommendations.items[0])
    assert explained.probability == pytest.approx(softmax[place], rel=1e-4)


@pytest.mark.parametrize("name", ["neighbours", "repeat_last"])
def test_an_index_is_refused(tmp_path, tiny_data, name):
    kind = KIND | ({"neighbours": 0} if name == "repeat_last" else {})
    workdir = save_run(tmp_path / "run", tiny_data, **kind)
    with pytest.raises(UserError, match=rf"config\.model\.{name}"):
        Recommender.load(workdir, approximate=True)
