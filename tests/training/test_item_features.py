"""A run with item features: what training changes, what the run keeps, and items added to it."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from tests.data.small_dataset import random_histories, write_dataset
from tests.training.tiny_run import MAX_LENGTH, LastItem, quick_config
from tim4rec_jax import config as config_lib
from tim4rec_jax.commands.add_items import add_items, read_table
from tim4rec_jax.data import format as fmt
from tim4rec_jax.data import open_dataset, train_item_counts
from tim4rec_jax.data.features import FEATURES_FILE, Categorical, Dense, FeatureTable
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.evaluate_run import evaluate_run
from tim4rec_jax.interop import to_torch
from tim4rec_jax.models import MODELS, FeatureArrays, build
from tim4rec_jax.models.base import DataSizes, ModelSettings
from tim4rec_jax.run import load_model
from tim4rec_jax.serving import Recommender
from tim4rec_jax.training.inputs import feature_arrays
from tim4rec_jax.training.objectives import every_position_loss
from tim4rec_jax.training.state import init_state
from tim4rec_jax.training.step import StepSettings, train_step
from tim4rec_jax.training.train import train
from tim4rec_jax.verify import verify

N_ITEMS, COLD = 20, 20  # item 20 is in test events only
COLORS = [[["red"], ["blue"], ["red", "blue"], []][n % 4] for n in range(N_ITEMS - 1)] + [["gold"]]


def arrays(cold=COLD):
    """What a model takes of these features; item `cold` has no training events."""
    counts = np.ones(N_ITEMS + 1, np.int64)
    counts[cold] = 0
    codes, weights, dense, values = features().arrays()
    return FeatureArrays(codes, weights, dense, counts, values)


def features(ids=N_ITEMS, colors=COLORS):
    columns = {
        "color": pa.array(colors, pa.list_(pa.string())),
        "size": np.arange(2 * ids, dtype=float).reshape(ids, 2),
    }
    kinds = (
        Categorical("color", ("red", "blue", "gold")),
        Dense("size", (N_ITEMS - 1.0, float(N_ITEMS)), (10.0, 10.0)),
    )
    return FeatureTable.encoded(kinds, columns)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    histories = random_histories([3, 5, 9, 12, 4, 6, 8, 10], n_items=N_ITEMS - 1)
    for items, _ in histories[:3]:
        items[-1] = COLD
    features().write(folder / FEATURES_FILE)
    return write_dataset(folder, histories, n_items=N_ITEMS)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "features"
    config = quick_config(dataset, objective="every_position", batch_size=4, epochs=2)
    config.model.id_dropout = 0.3
    train(config, workdir)
    return workdir


def held(model):
    return nnx.to_pure_dict(nnx.state(model))["item_embedding"]


def test_training_changes_the_maps_and_nothing_of_a_cold_item(run, dataset):
    _, model = load_model(run, fold=False)
    table = jax.device_get(held(model))
    maps = table["maps"]
    known = np.append(True, train_item_counts(open_dataset(dataset)) > 0)
    np.testing.assert_array_equal(table["embedding"].any(axis=1), known)
    # Values are unknown, red, blue, gold. Only the cold item is gold.
    assert maps["values"][1:4].any(axis=1).all() and not maps["values"][[0, 4]].any()
    assert maps["kernel"].any(axis=1).all()
    expected = feature_arrays(open_dataset(dataset))
    for name in ("codes", "weights", "dense"):
        np.testing.assert_array_equal(maps[name], getattr(expected, name))
    np.testing.assert_array_equal(maps["excluded"] == 0, known)
    assert not known[COLD]


def test_a_run_is_whole_and_its_model_needs_no_maps(run):
    assert not [finding.problem for finding in verify(run) if finding.problem]
    _, unfolded = load_model(run, fold=False)
    _, model = load_model(run)
    assert model.feature_maps is None and set(held(model)) == {"embedding"}
    np.testing.assert_allclose(model.item_table(), unfolded.item_table(), rtol=1e-6, atol=1e-8)
    recommended = Recommender.load(run).recommend(["i1", "i2"], [10, 20], k=N_ITEMS)
    assert f"i{COLD}" in recommended.items


def test_a_damaged_features_file_of_a_run_is_noticed(run):
    path = run / FEATURES_FILE
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    try:
        assert [f.part for f in verify(run) if f.problem] == [path]
    finally:
        path.write_bytes(content)


def test_cold_items_take_no_part_in_the_loss():
    """What a cold item would score changes nothing, and its features learn nothing from it."""
    sizes = DataSizes(N_ITEMS, MAX_LENGTH, item_features=arrays())
    model = LastItem(ModelSettings(), sizes, rngs=nnx.Rngs(0))
    batch = {
        "items": jnp.array([[1, 2, 3, 4]]),
        "gaps": jnp.zeros((1, 4)),
        "segment_ids": jnp.ones((1, 4), jnp.int32),
        "targets": jnp.array([[2, 3, 4, 5]]),
        "weights": jnp.ones((1, 4)),
    }
    graph, params, fixed = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss(params):
        return every_position_loss(nnx.merge(graph, params, fixed), batch, None)

    before, gradient = jax.jit(jax.value_and_grad(loss))(params)
    found = nnx.to_pure_dict(gradient)["item_embedding"]
    assert not found["embedding"][COLD].any() and found["embedding"][COLD - 1].any()
    assert not found["maps"]["values"][4].any() and found["maps"]["values"][2].any()
    louder = jax.tree.map(lambda leaf: leaf, params)
    louder["item_embedding"]["maps"]["values"][...] = (
        louder["item_embedding"]["maps"]["values"][...].at[4].set(50.0)
    )
    assert loss(louder) == before


def test_each_step_leaves_out_the_own_rows_of_other_items():
    """If no step did, the features would never learn to stand alone, as new items need it."""
    sizes = DataSizes(N_ITEMS, MAX_LENGTH, item_features=arrays())
    graph, params = nnx.split(LastItem(ModelSettings(id_dropout=0.5), sizes, rngs=nnx.Rngs(0)))
    batch = {
        "items": jnp.array([[1, 2], [3, 4]]),
        "lengths": jnp.array([2, 2]),
        "gaps": jnp.zeros((2, 2)),
        "targets": jnp.array([5, 6]),
        "weights": jnp.ones(2),
    }
    tx, left_out = optax.sgd(1.0), []
    before = np.asarray(params["item_embedding"]["embedding"][...])
    for number in (0, 1):
        state = init_state(jax.tree.map(jnp.copy, params), tx, seed=0)
        state = state.replace(step=jnp.int32(number))
        state, _ = train_step(state, batch, StepSettings(graph, tx))
        after = np.asarray(state.params["item_embedding"]["embedding"][...])
        left_out.append((after == before).all(axis=1)[1:COLD])  # all items have a gradient
    assert all(0.25 < rows.mean() < 0.75 for rows in left_out)
    assert (left_out[0] != left_out[1]).any()


def test_new_items_are_recommended_at_once(run, tmp_path):
    table = pa.table(
        {
            "item_id": ["i3", "new", "odd"],
            "color": [["red"], ["blue", "red"], ["never seen"]],
            "size": [[0.0, 0.0], [7.0, -7.0], [1.0, 2.0]],
        }
    )
    assert add_items(run, *read_table(run, table), tmp_path / "larger") == 2
    assert not [finding for finding in verify(tmp_path / "larger") if finding.problem]
    _, old = load_model(run, fold=False)
    _, larger = load_model(tmp_path / "larger")
    np.testing.assert_array_equal(
        larger.item_table()[: N_ITEMS + 1], load_model(run)[1].item_table()
    )
    maps = jax.device_get(held(old)["maps"])
    size = (np.array([7.0, -7.0]) - [N_ITEMS - 1, N_ITEMS]) / 10
    expected = maps["bias"] + size @ maps["kernel"] + maps["values"][[2, 3]].mean(axis=0)
    np.testing.assert_allclose(larger.item_table()[N_ITEMS + 1], expected, rtol=1e-5)
    before, after = (Recommender.load(one) for one in (run, tmp_path / "larger"))
    history = ["i1", "i2", "i7"], [10, 20, 30]
    old, new = (each.recommend(*history, k=N_ITEMS + 2) for each in (before, after))
    scores = dict(zip(new.items, new.scores, strict=True))
    assert scores.keys() - set(old.items) == {"new", "odd"}
    assert [scores[item] for item in old.items] == pytest.approx(old.scores, abs=1e-6)
    # An event of a new item counts like any other.
    assert after.recommend(["new"], [10], k=1).unknown == 0
    # Users of the training keep their histories, and the old events test no item that is new.
    assert "are known by their ids" in after.open_training()
    with pytest.raises(UserError, match=r"knows 2 items more than .* name the run that they were"):
        evaluate_run(tmp_path / "larger")
    # And once more.
    again = pa.table({"item_id": ["newest"], "color": [["red"]], "size": [[0.0, 0.0]]})
    add_items(tmp_path / "larger", *read_table(run, again), tmp_path / "largest")
    assert json.loads((tmp_path / "largest" / "dataset.json").read_text())["added_items"] == 3


def test_new_items_have_titles_where_the_others_have(run, tmp_path):
    titled = tmp_path / "titled"
    shutil.copytree(run, titled)
    metadata = json.loads((titled / fmt.DATASET_FILE).read_text())
    items = fmt.read_items(titled, metadata)
    names = [f"Title {n}" for n in range(N_ITEMS)]
    items = items.append_column("title", pa.array(names))
    pq.write_table(items, titled / fmt.ITEMS_FILE)
    metadata["content"] |= fmt.items_digests(items)
    metadata["item_features"] = {"title": "name"}
    (titled / fmt.DATASET_FILE).write_text(json.dumps(metadata))
    table = pa.table(
        {
            "item_id": ["i3", "new", "odd"],
            "name": ["another", "The new one", ""],
            "color": [["red"], ["blue", "red"], ["red"]],
            "size": [[0.0, 0.0], [7.0, -7.0], [1.0, 2.0]],
        }
    )
    for given, expected in ((table, "The new one"), (table.drop_columns("name"), None)):
        out = tmp_path / str(expected)
        add_items(titled, *read_table(titled, given), out)
        found = fmt.read_items(out, fmt.read_metadata(out))["title"].to_pylist()
        assert found == [*names, expected, None]
        assert not [finding for finding in verify(out) if finding.problem]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"item_id": ["i3"], "color": ["red"], "size": [[1.0, 2.0]]}, "knows all of these items"),
        ({"item_id": ["n"], "color": ["red"]}, "no column 'size'"),
        ({"item_id": ["n"], "color": ["red"], "size": [[1.0]]}, "have 1 numbers"),
        ({"item_id": ["n"], "color": [0.5], "size": [[1.0, 2.0]]}, "holds numbers"),
    ],
)
def test_items_that_cannot_be_added(run, tmp_path, table, says):
    with pytest.raises(UserError, match=says):
        add_items(run, *read_table(run, pa.table(table)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Those that make their table in another way than the base class.
OTHERS = ("bert4rec", "hstu", "popularity")
EVERY = [n if n in OTHERS else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]


@pytest.mark.parametrize("name", EVERY)
def test_every_model_scores_with_the_features(name):
    """But for Popularity, which learns nothing."""
    config = config_lib.default()
    config_lib.use_model(config, name)
    small = dict(hidden_size=8, inner_size=8, embedding_size=8, head_dim=8, d_state=4)
    config.model.update({key: value for key, value in small.items() if key in config.model})
    given = arrays()
    model = nnx.eval_shape(
        lambda: build(config.model, n_items=N_ITEMS, max_length=8, item_features=given)
    )
    if name == "popularity":
        assert model.feature_maps is None
        return
    graph, state = nnx.split(model)
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 1, leaf.shape), leaf.dtype), state)
    model = nnx.merge(graph, state)
    maps = model.item_embedding.maps
    for part in ("codes", "weights", "dense"):
        getattr(maps, part)[...] = jnp.asarray(getattr(given, part))
    maps.excluded[...] = jnp.where(given.counts > 0, 0.0, -1e4)
    rows = np.array(model.item_embedding.embedding[...])
    added = given.dense @ maps.kernel[...] + maps.bias[...]
    added += (maps.values[...][given.codes] * given.weights[..., None]).sum(axis=1)
    rows[1 : N_ITEMS + 1] += added[1:]
    vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True) if name == "hstu" else rows
    table = np.asarray(model.item_table())
    np.testing.assert_allclose(
        table[: N_ITEMS + 1, : rows.shape[1]], vectors[: N_ITEMS + 1], rtol=1e-4, atol=1e-5
    )
    model.item_embedding.fold()
    np.testing.assert_allclose(model.item_table(), table, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_lrurec_gives_a_cold_item_no_bias():
    config = {"name": "lrurec", "hidden_size": 8, "n_layers": 1}
    model = build(config, n_items=N_ITEMS, max_length=8, item_features=arrays())
    assert model.score_bias[COLD] == 0 and model.score_bias[COLD - 1] != 0
    assert not model.item_embedding.embedding[COLD].any() and not model.feature_maps.values.any()


def test_settings_leave_features_out(dataset):
    sizes = DataSizes(N_ITEMS, MAX_LENGTH, item_features=feature_arrays(open_dataset(dataset)))
    model = LastItem(ModelSettings(item_features=False), sizes, rngs=nnx.Rngs(0))
    assert model.feature_maps is None


def test_folded_weights_become_those_of_the_published_code():
    config = {"name": "sasrec", "hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 2}
    model = nnx.eval_shape(
        lambda: build(config, n_items=N_ITEMS, max_length=8, item_features=arrays())
    )
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), state))
    with pytest.raises(UserError, match="item features"):
        to_torch(model)
    model.item_embedding.fold()
    assert to_torch(model)["item_embedding.weight"].shape == (N_ITEMS + 1, 8)
