"""A training that begins with another run, and a finished one that goes on for more epochs."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pytest
from flax import nnx
from jax.tree_util import keystr, tree_leaves_with_path

from tests.data.small_dataset import random_histories, write_dataset
from tests.training.tiny_run import die_at, quick_config
from tim4rec_jax import api
from tim4rec_jax import config as config_lib
from tim4rec_jax.cli import parse
from tim4rec_jax.data import open_dataset
from tim4rec_jax.data.features import FEATURES_FILE, Categorical, Dense, FeatureTable
from tim4rec_jax.digests import read_digests
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import build
from tim4rec_jax.run import load_model, read_settings, write_settings
from tim4rec_jax.training import dispatch, warm_start
from tim4rec_jax.training.inputs import feature_arrays
from tim4rec_jax.training.row_matching import (
    BIAS,
    KERNEL,
    VALUES,
    FeatureMatch,
    Vocabulary,
    at_other_dates,
    new_rows,
    zeros,
)
from tim4rec_jax.training.state import make_optimizer
from tim4rec_jax.training.train import train
from tim4rec_jax.training.warm_start import _check_same_model, _entity_axes

DAY = 86_400


def settings(dataset, **train):
    """A model with all biases, on packed rows."""
    config = quick_config(dataset, objective="every_position", batch_size=6, epochs=2)
    config.model.update(repeat_bias=True, repeat_last=True, date_bias_knots=3)
    config.train.update(train)
    return config


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory):
    """A folder with a dataset of the items i1 to i30, and a finished run on it."""
    folder = tmp_path_factory.mktemp("yesterday")
    dataset = write_dataset(folder / "data", random_histories([14] * 30))
    train(settings(dataset, learning_rate=0.01), folder / "run")
    return folder


@pytest.fixture(scope="module")
def today(tmp_path_factory):
    """A dataset a day later: i11 to i30 in another order, i31 to i34 are new, the rest is gone."""
    folder = tmp_path_factory.mktemp("today") / "data"
    rename = [f"i{number}" for number in [*range(34, 10, -1)]]
    return write_dataset(
        folder, random_histories([14] * 30, seed=1, n_items=24, start=880_000_000 + DAY), ids=rename
    )


def best(workdir, **options):
    params = nnx.to_pure_dict(nnx.state(load_model(workdir, **options)[1], nnx.Param))
    return {
        keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in tree_leaves_with_path(params)
    }


def first_state(config, workdir, monkeypatch):
    """The state before the first step of a training, which ends there."""
    found = []

    def stopped(self, state):
        found.append(jax.device_get((state.params, state.opt_state)))
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(dispatch.HostSteps, "run", stopped)
        train(config, workdir)
    return found[0]


def test_items_keep_their_rows_by_id(yesterday, today, tmp_path, monkeypatch, capsys):
    config = settings(today, init_from=str(yesterday / "run"))
    params, opt_state = first_state(config, tmp_path / "run", monkeypatch)
    assert "20 items as there, 4 new, 10 dropped; Adam goes on" in capsys.readouterr().out
    old, adam = best(yesterday / "run"), opt_state[1][0]
    table, before = (
        np.asarray(params["item_embedding"]["embedding"]),
        old["item_embedding/embedding"],
    )
    # Items i34 to i11 have the rows 1 to 24; i31 to i34 are new.
    for moved in (table, np.asarray(adam.mu["item_embedding"]["embedding"])):
        assert moved.shape == (25, 8)
    np.testing.assert_array_equal(table[5:], before[30:10:-1])
    np.testing.assert_array_equal(table[0], before[0])
    mean, spread = before[1:].mean(axis=0), before[1:].std(axis=0)
    assert (np.abs(table[1:5] - mean) < 0.06 * spread).all()
    assert len(np.unique(table[1:5] @ before[1])) == 4  # no two of them have the same score
    assert float(params["offset"][...]) == old["offset"] != 0
    own = np.asarray(params["last_offset"])
    np.testing.assert_array_equal(own[5:], old["last_offset"][30:10:-1])
    assert own[5:].any() and not own[1:5].any()
    assert not np.asarray(adam.mu["item_embedding"]["embedding"])[1:5].any()
    nu = np.asarray(adam.nu["item_embedding"]["embedding"])
    assert nu.all()
    np.testing.assert_array_equal(nu[1:5], np.broadcast_to(nu[1], (4, 8)))
    assert int(adam.count) > 0


def test_a_date_bias_goes_on_at_the_dates_of_the_new_data(yesterday, today, tmp_path, monkeypatch):
    config = settings(today, init_from=str(yesterday / "run"))
    config.model.date_bias_knots = 5
    config.model.neighbours = 3  # what a ranking adds may begin on any day
    params, opt_state = first_state(config, tmp_path / "run", monkeypatch)
    old = best(yesterday / "run")["drift/vectors"]
    assert old[-1].any()
    # All of today's dates come after yesterday's last knot.
    np.testing.assert_array_equal(params["drift"]["vectors"], np.tile(old[-1], (5, 1)))
    assert np.asarray(opt_state[1][0].nu["drift"]["vectors"]).shape == (5, 8)


def test_valuesat_other_dates():
    old, vectors = np.array([0.0, 1.0, 2.0]), np.float32([[0, 5], [10, 5], [40, 5]])
    found = at_other_dates(vectors, old, np.array([-1.0, 0.5, 1.75, 9.0]))
    np.testing.assert_array_equal(found, np.float32([[0, 5], [5, 5], [32.5, 5], [40, 5]]))


def test_moments_that_begin_anew(yesterday, today, tmp_path, monkeypatch):
    config = settings(today, init_from=str(yesterday / "run"), init_optimizer="rewarm")
    _, opt_state = first_state(config, tmp_path / "run", monkeypatch)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(opt_state))


@pytest.mark.parametrize("cosine_steps", [None, 40])
def test_the_learning_rate_rises(cosine_steps):
    """By the size of Adam's updates: with a constant gradient, that is the learning rate."""
    params = {"w": np.float32(0)}
    rates = []
    for warmup in (0, 4):
        tx = make_optimizer(0.5, 0.0, cosine_steps, warmup)
        state, sizes = tx.init(params), []
        for _ in range(8):
            updates, state = tx.update({"w": np.float32(1)}, state, params)
            sizes.append(-float(updates["w"]))
        rates.append(np.array(sizes))
    # Adam's epsilon and float32 account for 1e-5.
    np.testing.assert_allclose(rates[1], rates[0] * [0.25, 0.5, 0.75, 1, 1, 1, 1, 1], rtol=1e-5)


def test_a_killed_warm_start_ends_in_the_same_bits(yesterday, today, tmp_path, monkeypatch):
    shutil.copytree(yesterday / "run", tmp_path / "source")
    config = settings(today, init_from=str(tmp_path / "source"), checkpoint_minutes=1e-9)
    train(config, tmp_path / "calm")
    die_at(1, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "hit")
    shutil.rmtree(tmp_path / "source")  # the run goes on without it
    monkeypatch.undo()
    die_at(8, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "hit")
    train(config, tmp_path / "hit")
    assert_same_run(tmp_path / "hit", tmp_path / "calm")


def assert_same_run(ours, theirs):
    """Every array, and every figure but those of the clock."""
    for folder in ("checkpoints", "best"):
        steps = [max(int(path.name) for path in (run / folder).iterdir()) for run in (ours, theirs)]
        assert steps[0] == steps[1]
        digests = [read_digests(run / folder / str(steps[0])) for run in (ours, theirs)]
        # The progress holds the seconds.
        digests = [{n: v for n, v in each.items() if n != "progress"} for each in digests]
        assert len(digests[0]) > 2
        assert digests[0] == digests[1]
    logs = [(run / "log.jsonl").read_text().splitlines() for run in (ours, theirs)]
    logs = [[json.loads(line) | {"time": 0} for line in log] for log in logs]
    logs = [[each for each in log if each["kind"] != "train"] for log in logs]
    assert logs[0] == logs[1]
    figures = [json.loads((run / "metrics.json").read_text()) for run in (ours, theirs)]
    times = {"seconds": 0, "processor_seconds": 0}
    assert figures[0] | times == figures[1] | times


def test_more_epochs_end_in_the_bits_of_a_run_that_was_asked_for_them(yesterday, tmp_path):
    dataset, run = yesterday / "data", tmp_path / "run"
    train(settings(dataset, learning_rate=0.01, epochs=1), run)
    train(settings(dataset, learning_rate=0.01), run)
    assert_same_run(run, yesterday / "run")
    assert read_settings(run / "config.json").train.epochs == 2
    config = settings(dataset, learning_rate=0.01, epochs=1)
    with pytest.raises(UserError, match=r"other settings: train.epochs \(2 -> 1\)"):
        train(config, run)


# In every test run, the epochs that are added go on from a checkpoint in the test above.
@pytest.mark.slow
def test_a_kill_in_the_epochs_that_were_added(yesterday, tmp_path, monkeypatch):
    dataset, run = yesterday / "data", tmp_path / "run"
    train(settings(dataset, learning_rate=0.01, epochs=1), run)
    config = settings(dataset, learning_rate=0.01)
    die_at(3, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, run)
    assert not (run / "metrics.json").exists()  # it is not a finished run of one epoch, nor of two
    train(config, run)
    assert_same_run(run, yesterday / "run")


@pytest.fixture
def source(yesterday, tmp_path):
    return shutil.copytree(yesterday / "run", tmp_path / "source")


def test_more_epochs_where_they_would_not_be_the_same(yesterday, source):
    config = settings(yesterday / "data", learning_rate=0.01, epochs=3)
    shutil.rmtree(source / "checkpoints")
    with pytest.raises(UserError, match=r"train.epochs \(2 -> 3\): its checkpoints are gone"):
        train(config, source)
    config.train.schedule = "cosine"
    with pytest.raises(UserError, match=r"train.schedule \(constant -> cosine\)"):
        train(config, source)
    written = read_settings(source / "config.json")
    written.train.schedule = "cosine"
    write_settings(written, source / "config.json")
    with pytest.raises(
        UserError, match="its learning rate has followed the old number; train anew"
    ):
        train(config, source)
    assert (source / "metrics.json").exists()


@pytest.mark.parametrize("every", [{"valid_epochs": 3}, {"valid_steps": 7}])
def test_more_epochs_after_a_validation_that_they_would_not_have(yesterday, source, every):
    written = read_settings(source / "config.json")
    written.eval.update(every)
    write_settings(written, source / "config.json")
    config = settings(yesterday / "data", learning_rate=0.01, epochs=3)
    config.eval.update(every)
    with pytest.raises(UserError, match="at its end it validated where a longer run does not"):
        train(config, source)
    assert (source / "metrics.json").exists()


def test_a_setting_without_effect_may_differ(today):
    ours, theirs = settings(today), settings(today)
    for config in (ours, theirs):
        config_lib.use_model(config, "mamba4rec")
    ours.model.single_layer_residual = True
    _check_same_model(ours, theirs, Path("run"))
    ours.model.num_layers = theirs.model.num_layers = 1
    with pytest.raises(UserError, match=r"model.single_layer_residual \(False -> True\)"):
        _check_same_model(ours, theirs, Path("run"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model.repeat_last": False},
            r"other settings: model.repeat_last \(True -> False\); take",
        ),
        ({"model.date_bias_knots": 0}, r"model.date_bias_knots \(3 -> 0\)"),
        ({"model.name": "popularity"}, "counts the events of its dataset and learns nothing"),
        ({"train.init_from": "nowhere"}, "nowhere is no run directory"),
    ],
    ids=["repeat", "dates", "popularity", "missing"],
)
def test_what_cannot_be_begun_with(yesterday, today, tmp_path, change, says):
    config = settings(today, init_from=str(yesterday / "run"))
    if "model.name" in change:
        config_lib.use_model(config, change["model.name"])
    else:
        config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=says):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_cannot_begin_with_itself(yesterday, source):
    shutil.rmtree(source / "checkpoints")
    (source / "config.json").unlink()
    with pytest.raises(UserError, match="--init-from and --workdir are both"):
        train(settings(yesterday / "data", init_from=str(source)), source)


def test_a_source_without_checkpoints(today, source, tmp_path):
    shutil.rmtree(source / "checkpoints")
    config = settings(today, init_from=str(source))
    with pytest.raises(
        UserError, match=r"no checkpoint .* take config.train.init_optimizer=rewarm"
    ):
        train(config, tmp_path / "run")


def test_other_items(yesterday, tmp_path):
    ids = [f"other{number}" for number in range(30)]
    write_dataset(tmp_path / "data", random_histories([14] * 30), ids=ids)
    config = settings(tmp_path / "data", init_from=str(yesterday / "run"))
    with pytest.raises(UserError, match=r"has no item of .*; were both prepared with the same col"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tim4rec", {"item_embedding/embedding": ("n_items", 0)}),
        (
            "bert4rec",
            {"item_embedding/embedding": ("n_items", 0), "output_bias": ("n_items", 0)},
        ),
        (
            "caser",
            {
                "item_embedding/embedding": ("n_items", 0),
                "user_embedding/embedding": ("n_users", 0),
            },
        ),
    ],
)
def test_which_parameters_have_a_row_for_each_item(name, expected):
    make = functools.partial(build, {"name": name}, n_items=20, n_users=5, max_length=4)
    assert _entity_axes(make, nnx.eval_shape(make)) == expected


def test_rows_that_are_no_items_stay():
    """BERT4Rec's mask comes after the items."""
    vocabulary = Vocabulary.matched(pa.chunked_array([["a", "b"]]), pa.chunked_array([["b", "c"]]))
    moved = vocabulary.move(np.array([0, 1, 2, 9]), 0, lambda rows, count: np.full(count, 7))
    assert moved.tolist() == [0, 2, 7, 9]


def test_new_rows_are_the_same_in_each_start():
    rows = np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32)
    found = [new_rows(rows, 5, np.random.default_rng(1)) for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert found[0].dtype == np.float32


def test_flags(yesterday, tmp_path):
    named = ["train.py", "--config=causal", f"--config.dataset={tmp_path}"]
    for words in (["--init-from", "runs/a"], ["--init-from=runs/a"], ["--init_from=runs/a"]):
        assert parse([*named, *words], usage="")[0].train.init_from == "runs/a"
    with pytest.raises(UserError, match=r"train.init_from is ''; it must name a run directory"):
        parse([*named, "--init-from="], usage="")
    with pytest.raises(
        UserError, match=r"init_optimizer is 'rewarm', which a training from random"
    ):
        parse([*named, "--config.train.init_optimizer=rewarm"], usage="")
    run = yesterday / "run"
    config, workdir = parse(["train.py", f"--workdir={run}", "--config.train.epochs=6"], usage="")
    assert workdir == run
    assert config.train.epochs == 6
    assert config.data.to_dict() == read_settings(run / "config.json").data.to_dict()


def test_fit_begins_with_a_model(yesterday, today, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(
        "tim4rec_jax.training.train.train_and_report", lambda *a: found.append(a[0])
    )
    for source in (yesterday / "run", str(yesterday / "run"), api.Model(yesterday / "run")):
        api.fit(today, settings(today), workdir=tmp_path / "run", init_from=source)
    assert {config.train.init_from for config in found} == {str(yesterday / "run")}


def features(mean, std, genres, numbers):
    """Of the items: `genres` with their values, and one number each, as in the source."""
    words = sorted({genre for genre in genres if genre})
    kinds = [Categorical("genre", tuple(words)), Dense("price", (mean,), (std,))]
    lists = pa.array([[genre] if genre else [] for genre in genres], pa.list_(pa.string()))
    return FeatureTable.encoded(kinds, {"genre": lists, "price": np.array(numbers)[:, None]})


def added(table, params):
    """What features add to the vectors of items, by the definition."""
    codes, weights, dense, _ = table.arrays()
    parts = params[VALUES][codes] * weights[..., None]
    return (parts.sum(axis=1) + dense @ params[KERNEL] + params[BIAS])[1:]


def test_features_add_what_they_added(tmp_path):
    """Items a and b are in both runs. There is another genre, and prices have other statistics."""
    rng = np.random.default_rng(0)
    old = features(2.0, 4.0, ["x", "y", ""], [1.0, 9.0, 2.0])
    new = features(-1.0, 0.5, ["w", "y", "x"], [7.0, 9.0, 1.0])
    shapes = {VALUES: (4, 3), KERNEL: (1, 3), BIAS: (3,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    match = FeatureMatch.matched(old, new)
    moved = dict(params)
    for name, kind in ((VALUES, "values"), (KERNEL, "numbers")):
        moved[name] = match.vocabularies[kind].move(params[name], 0, zeros)
    match.keep_sums(moved)
    before, now = added(old, params), added(new, moved)
    # Two float32 products of numbers below 20.
    np.testing.assert_allclose(now[[2, 1]], before[[0, 1]], rtol=1e-5, atol=1e-5)
    assert not moved[VALUES][2].any()  # nothing is known of the genre w


def test_categories_alone_have_no_map_of_numbers():
    genres = [Categorical("genre", ("a", "b"))]
    lists = {"genre": pa.array([["a"], ["b"]], pa.list_(pa.string()))}
    table = FeatureTable.encoded(genres, lists)
    params = {BIAS: np.ones(3, np.float32)}
    FeatureMatch.matched(table, table).keep_sums(params)
    assert list(params) == [BIAS] and params[BIAS].tolist() == [1, 1, 1]


def test_items_without_events_stay_on_their_features(tmp_path, monkeypatch):
    """The mean of yesterday's gradients would have Adam move rows that have no gradient today."""
    numbers = range(1, 31)
    prices, genres = [float(n % 7) for n in numbers], ["ab"[n % 2] for n in numbers]
    features(0.0, 1.0, genres, prices).write(tmp_path / FEATURES_FILE)
    histories = random_histories([14] * 30, n_items=29)  # one item has no event
    dataset = open_dataset(write_dataset(tmp_path, histories, ids=[f"i{n}" for n in numbers]))
    config = quick_config(tmp_path, objective="every_position", init_from=str(tmp_path))
    config = config_lib.resolve(config)
    make = functools.partial(
        build,
        config.model,
        n_items=30,
        n_users=30,
        max_length=12,
        seed=0,
        item_features=feature_arrays(dataset),
    )
    model = make()
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    adam = optax.ScaleByAdamState(jnp.int32(9), ones, ones)
    monkeypatch.setattr(warm_start, "load_model", lambda run, fold: (config, model))
    monkeypatch.setattr(warm_start, "check_model", lambda *_: None)
    monkeypatch.setattr(warm_start, "_read_adam", lambda *_: adam)
    structure = nnx.eval_shape(make)
    start = warm_start.read_warm_start(config, tmp_path / "run", dataset, make, structure)
    assert start.moments is not None
    name = "item_embedding/embedding"
    assert not start.params[name][30].any() and not start.moments.mu[name][30].any()
    assert start.moments.mu[name][:30].all() and start.moments.nu[name].all()


# In every test run, `test_features_add_what_they_added` looks at what is done to the maps.
@pytest.mark.slow
def test_new_items_begin_with_their_features(tmp_path, monkeypatch):
    folders = []
    for name, ids, seed in (("old", range(1, 31), 0), ("new", range(11, 41), 1)):
        folder = tmp_path / name
        folder.mkdir()
        prices = [float(number % 7) for number in ids]
        genres = ["ab"[number % 2] for number in ids]
        features(float(seed), 1.0 + seed, genres, prices).write(folder / FEATURES_FILE)
        histories = random_histories([14] * 30, seed=seed, n_items=29)  # one item has no event
        folders.append(write_dataset(folder, histories, ids=[f"i{number}" for number in ids]))
    old, new = folders
    train(settings(old, learning_rate=0.01, epochs=1), tmp_path / "run")
    config = settings(new, init_from=str(tmp_path / "run"))
    params, opt_state = first_state(config, tmp_path / "today", monkeypatch)
    table, before = params["item_embedding"], best(tmp_path / "run", fold=False)
    rows = np.asarray(table["embedding"])
    np.testing.assert_array_equal(rows[1:20], before["item_embedding/embedding"][11:30])
    assert not rows[21:].any()  # they stand on their features
    assert rows[1:20].any()
    np.testing.assert_array_equal(table["maps"]["values"], before[VALUES])
    np.testing.assert_allclose(table["maps"]["kernel"], 2 * before[KERNEL], rtol=1e-6)
    assert np.asarray(table["maps"]["excluded"])[30] < 0  # today's, not yesterday's
    assert opt_state[1][0].nu["item_embedding"]["maps"]["values"].shape == before[VALUES].shape

    (new / FEATURES_FILE).unlink()
    metadata = json.loads((new / "dataset.json").read_text())
    del metadata["content"]["features"]
    (new / "dataset.json").write_text(json.dumps(metadata))
    params, _ = first_state(config, tmp_path / "without", monkeypatch)
    folded = best(tmp_path / "run")["item_embedding/embedding"]
    np.testing.assert_array_equal(params["item_embedding"]["embedding"][1:21], folded[11:])
    run = tmp_path / "without"
    config = settings(old, init_from=str(run), init_optimizer="rewarm")
    train(settings(new, init_from=str(tmp_path / "run")), run)
    with pytest.raises(UserError, match=r"was trained without item features, and .* has some"):
        train(config, tmp_path / "again")
    config.model.item_features = False  # as the message says
    train(config, tmp_path / "again")
