"""Training from start to end, in this process and on a tiny model."""

import functools
import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.data.small_dataset import random_histories, write_dataset
from tests.training.tiny_run import (
    MAX_LENGTH,
    Recorder,
    die_at,
    parameters,
    quick_config,
    tiny_config,
)
from tim4rec_jax import config as config_lib
from tim4rec_jax.commands.search import validations
from tim4rec_jax.data import TrainBatches, open_dataset, train_item_counts
from tim4rec_jax.data.pipeline import train_iterator
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import metrics, standard_errors
from tim4rec_jax.evaluation.metrics import TIES
from tim4rec_jax.evaluation.protocol import best_epoch
from tim4rec_jax.models import build
from tim4rec_jax.run import load_model, only_process, read_date_range
from tim4rec_jax.training import dispatch, processes
from tim4rec_jax.training import train as loop
from tim4rec_jax.training.state import make_optimizer
from tim4rec_jax.training.train import train


def cycles(n_items=30):
    """Every user walks round the items in the same order: the next one is certain."""
    return [
        ((start + np.arange(14)) % n_items + 1, 880_000_000 + 3600 * np.arange(14))
        for start in range(n_items)
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    histories = [(items.astype(np.int32), times) for items, times in cycles()]
    return write_dataset(tmp_path_factory.mktemp("data") / "cycles", histories)


def records(workdir, kind):
    lines = (workdir / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A run directory with a finished run of 8 epochs."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train(quick_config(dataset, epochs=8, learning_rate=0.01), workdir)
    return workdir


# In every test run, TiM4Rec learns in `test_learns_at_every_position`.
@pytest.mark.slow
def test_learns_what_can_be_learnt(dataset, tmp_path):
    figures = train(tiny_config(dataset, epochs=8, learning_rate=0.01), tmp_path)
    losses = [record["train_loss"] for record in records(tmp_path, "valid")]
    assert losses[0] > 3.0
    assert losses[-1] < 0.6
    assert figures["test"]["hit@10"] == 1.0
    assert figures["test"]["ndcg@10"] > 0.9


def test_what_a_run_records(finished):
    epochs = records(finished, "valid")
    assert [record["epoch"] for record in epochs] == [*range(1, 9)]
    losses = [record["train_loss"] for record in epochs]
    assert losses[-1] < losses[0]
    figures = json.loads((finished / "metrics.json").read_text())
    assert (figures["users"], figures["epochs"]) == (30, 8)
    best = max(round(record["ndcg@10"], 4) for record in epochs)
    assert round(figures["valid"]["ndcg@10"], 4) == best
    last_best = [r["epoch"] for r in epochs if round(r["ndcg@10"], 4) == best][-1]
    assert figures["best_epoch"] == last_best
    assert validations(finished) == {record["epoch"]: record["ndcg@10"] for record in epochs}
    (test,) = records(finished, "test")
    assert test["ndcg@10"] == figures["test"]["ndcg@10"]
    told = figures["protocol"]
    assert (told["part"], told["seen"], told["ties"], told["ks"]) == (
        *("test", "ranked", "optimistic"),
        [10, 20, 50],
    )
    assert best_epoch(finished) == last_best


def test_keeps_the_items_of_its_dataset(finished, dataset):
    assert (finished / "items.parquet").read_bytes() == (dataset / "items.parquet").read_bytes()


def test_learns_at_every_position(dataset, tmp_path, capsys):
    config = tiny_config(dataset)
    config.model.update(time_encoding="causal", repeat_bias=True)
    config.train.update(objective="every_position", batch_size=2, schedule="cosine")
    config.train.update(epochs=8, patience=8, learning_rate=0.04)
    config.model.knows_next_time = True
    figures = train(config, tmp_path / "run")
    assert figures["test"]["hit@10"] == 1.0
    assert figures["test"]["ndcg@10"] > 0.9
    assert "rows of 12 packed to 98.2%" in capsys.readouterr().out
    losses = [record["train_loss"] for record in records(tmp_path / "run", "valid")]
    assert losses[0] > 2.5
    assert losses[-1] < 0.6


def test_the_model_that_only_counts(dataset, tmp_path):
    config = quick_config(dataset)
    config_lib.use_model(config, "popularity")
    config.eval.ties = "expected"
    result = train(config, tmp_path / "run")
    # All items have equal scores. The optimistic rule would make every target the first.
    for figures in (result["valid"], result["test"], *records(tmp_path / "run", "valid")):
        assert figures["hit@10"] == pytest.approx(10 / 30)
    assert result["protocol"]["ties"] == "expected"
    assert result["epochs"] == 1 and read_date_range(tmp_path / "run") is None
    ds, (_, model) = open_dataset(config.dataset), load_model(tmp_path / "run")
    hidden = model.encode(jnp.ones((1, 2), jnp.int32), jnp.array([2]), jnp.zeros((1, 2)))
    counts = train_item_counts(ds)
    assert (counts != ds.item_counts).any()  # which hold the events of the test, too
    np.testing.assert_array_equal((hidden @ model.item_table().T)[0, 1:], counts)


@pytest.mark.parametrize(
    "change",
    [
        {"train.weight_decay": 0.1},
        {"data.windows_per_user": 1},
        {"train.loss": "gbce", "train.calibration": 0.0},
    ],
)
def test_a_setting_changes_what_is_learnt(dataset, tmp_path, change):
    found = []
    for name, more in (("a", {}), ("b", change)):
        config = quick_config(dataset, epochs=1)
        if "train.loss" in change:
            config.train.update(loss="gbce", negatives=4)
        if "data.windows_per_user" in change:  # of which a history must have several
            config.train.objective = "every_position"
            config.data.update(max_length=4, buckets=(4,))
        config.update_from_flattened_dict(more)
        train(config, tmp_path / name)
        found.append(jax.tree.leaves(nnx.state(load_model(tmp_path / name)[1], nnx.Param)))
    assert any((one[...] != other[...]).any() for one, other in zip(*found, strict=True))


def test_validation_every_second_epoch(dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.2])
    config = quick_config(dataset, epochs=4)
    config.eval.valid_epochs = 2
    train(config, tmp_path)
    assert [record["epoch"] for record in records(tmp_path, "valid")] == [2, 4]


def test_a_run_that_goes_on_keeps_its_stale_epochs(dataset, tmp_path, monkeypatch):
    config = quick_config(dataset, epochs=9, patience=1)
    run = dispatch.HostSteps.run

    def signalled(self, state):
        if last_of_epoch(self, state) and int(state.step) + 1 > self._batches.batches_per_epoch:
            signal.raise_signal(signal.SIGTERM)
        return run(self, state)

    scripted(monkeypatch, [0.3, 0.2])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dispatch.HostSteps, "run", signalled)
        train(config, tmp_path)
    scripted(monkeypatch, [0.1, 0.9])
    figures = train(config, tmp_path)
    assert (figures["epochs"], figures["best_epoch"]) == (3, 1)


@pytest.fixture(scope="module")
def packed(dataset, tmp_path_factory):
    """A run directory with a finished run of packed rows, and its settings."""
    workdir = tmp_path_factory.mktemp("runs") / "packed"
    config = quick_config(dataset, objective="every_position", batch_size=6, schedule="cosine")
    config.model.update(repeat_bias=True, date_bias_knots=4)
    config.model.update(neighbours=3, neighbours_follow=True)
    config.train.checkpoint_minutes = 1e-9  # a checkpoint after every step
    train(config, workdir)
    return workdir, config


def test_a_stopped_run_of_packed_rows_ends_in_the_same_bits(packed, tmp_path, monkeypatch):
    calm, config = packed
    die_at(8, monkeypatch)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "hit")
    assert len(records(tmp_path / "hit", "valid")) == 1  # in the second of two epochs
    config = config.copy_and_resolve_references()
    config.train.checkpoint_minutes = 60.0  # a setting that changes no result may change
    hit = train(config, tmp_path / "hit")
    assert hit["test"] == json.loads((calm / "metrics.json").read_text())["test"]
    pairs = [parameters(workdir) for workdir in (calm, tmp_path / "hit")]
    jax.tree.map(np.testing.assert_array_equal, *pairs)
    assert pairs[0]["drift"]["vectors"].any()


def test_a_run_keeps_the_dates_of_what_it_was_trained_on(packed, dataset):
    ds = open_dataset(dataset)
    trained_on = ds.lengths - 2
    times = ds.timestamps(ds.offsets[:-1], trained_on, int(trained_on.max()))
    assert read_date_range(packed[0]) == (times[times > 0].min(), times.max())


def test_a_run_keeps_what_follows_each_item(packed):
    _, model = load_model(packed[0])
    nearest = np.asarray(model.neighbours.items[...])[1:, 0]
    np.testing.assert_array_equal(nearest, np.arange(1, 31) % 30 + 1)  # everybody walks this way


def test_a_finished_run_is_left_as_it_is(finished, dataset, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "train_step", None)
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    figures = train(quick_config(dataset, epochs=8, learning_rate=0.01), finished)
    assert figures == json.loads((finished / "metrics.json").read_text())
    assert "is finished already; its figures are in" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {finished / ".lock"}
    assert after.keys() == before.keys()


@functools.partial(jax.jit, static_argnames="settings")
def scripted_step(state, batch, settings, cumulative):
    """A step that learns nothing. The loss of a sample is its target."""
    weights = batch["weights"]
    state = state.replace(
        step=state.step + 1,
        loss_sum=state.loss_sum + jnp.sum(weights * batch["targets"]),
        weight_sum=state.weight_sum + weights.sum(),
    )
    metrics = {"loss": state.loss_sum / state.weight_sum, "bad_step": state.bad_step}
    return state, metrics


def scripted(monkeypatch, scores):
    """Replaces training by a step that learns nothing, and validation by scores to come."""
    scores = iter(scores)

    def evaluate(model, dataset, split, **settings):
        ndcg = next(scores) if split == "valid" else 0.5
        return {"hit@10": ndcg, "ndcg@10": ndcg}, np.array([1, 2, 0])

    monkeypatch.setattr(dispatch, "train_step", scripted_step)
    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "compile_evaluation", lambda *_, **__: None)


def test_the_loss_logged_is_the_mean_over_every_sample_once(dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.2])
    train(quick_config(dataset), tmp_path)
    targets = np.concatenate([items[1:-2] for items, _ in cycles()])
    assert len(targets) % 16  # so that the last batch has filler rows
    losses = [record["train_loss"] for record in records(tmp_path, "valid")]
    np.testing.assert_allclose(losses, [targets.mean()] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("scores", "epochs", "best"),
    [
        # More than `patience` = 2 epochs in a row that are not as good as the best.
        ([0.1, 0.3, 0.2, 0.29, 0.2, 0.9], 5, 2),
        # On figures rounded to four decimals a tie counts as better: .19996 is .2000.
        ([0.2, 0.19996, 0.1, 0.19994, 0.20004, 0.1, 0.1, 0.1, 0.9], 8, 5),
        ([0.1, 0.05, 0.05, 0.1, 0.05, 0.05, 0.3, 0.2, 0.1, 0.4], 10, 10),
    ],
)
def test_early_stopping(dataset, tmp_path, monkeypatch, scores, epochs, best):
    scripted(monkeypatch, scores)
    monkeypatch.setattr(loop.Checkpoints, "save", lambda *_: None)  # the best ones are kept
    config = quick_config(dataset, epochs=10, patience=2)
    figures = train(config, tmp_path)
    assert (figures["epochs"], figures["best_epoch"]) == (epochs, best)
    assert figures["valid"]["ndcg@10"] == scores[best - 1]
    per_epoch = records(tmp_path, "valid")[0]["step"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == [str(best * per_epoch)]


def last_of_epoch(steps, state):
    """Whether the step that comes next is the last one of its epoch."""
    return (int(state.step) + 1) % steps._batches.batches_per_epoch == 0


def test_stopping_right_after_an_epoch_does_not_leave_its_validation_out(
    dataset, tmp_path, monkeypatch
):
    """A signal that comes while the last step of an epoch runs."""
    config = quick_config(dataset, epochs=3)
    scripted(monkeypatch, [0.1, 0.3])
    run = dispatch.HostSteps.run

    def signalled(self, state):
        if last_of_epoch(self, state):
            signal.raise_signal(signal.SIGTERM)
        return run(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch.HostSteps, "run", signalled)
        for epoch in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path)
            assert [record["epoch"] for record in records(tmp_path, "valid")][-1] == epoch
    scripted(monkeypatch, [0.2])
    assert train(config, tmp_path)["best_epoch"] == 2
    assert [record["ndcg@10"] for record in records(tmp_path, "valid")] == [0.1, 0.3, 0.2]


def test_another_process_than_the_first_writes_its_parts_of_checkpoints_only(
    dataset, tmp_path, monkeypatch
):
    """Where all wrote the settings, the log and the figures, they would damage each other's."""
    scripted(monkeypatch, [0.1, 0.2])
    monkeypatch.setattr(processes, "first", lambda: False)
    monkeypatch.setattr(loop, "rank_targets", lambda *_, **__: (np.array([1, 2]), np.zeros(2, int)))
    config = quick_config(dataset)
    config.mesh.data = 2
    train(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "best"}


def test_processes_stop_and_save_when_they_agreed_to(dataset, tmp_path, monkeypatch):
    """Of these wishes, none is this process's own. It asks the others every eighth step."""
    answers = iter([(False, False), (False, False), (False, True), (True, False)])
    scripted(monkeypatch, [0.1])
    monkeypatch.setattr(processes, "together", lambda: True)
    monkeypatch.setattr(processes, "agreed", lambda stop, save: next(answers))
    config = quick_config(dataset)
    config.mesh.data = 1
    with pytest.raises(KeyboardInterrupt, match="stopped at step 16, saved"):
        train(config, tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["16", "8"]


def test_all_that_a_run_draws_comes_from_its_seed(dataset, tmp_path, monkeypatch):
    """What did not would be equal in runs with several seeds, which would look alike for that."""
    config, seeds = quick_config(dataset, epochs=1), {}
    config.seed, config.eval.valid_users = 77, 5
    scripted(monkeypatch, [0.1])

    def noted(name, of):
        def call(*arguments, **settings):
            seeds[name] = settings["seed"]
            return of(*arguments, **settings)

        monkeypatch.setattr(loop, name, call)

    noted("build", loop.build)
    noted("init_state", loop.init_state)
    validate, make = loop.evaluate, loop.make_batches

    def sampled(*arguments, sample, **settings):
        seeds["validation"] = sample[1]
        return validate(*arguments, **settings)

    def batches(*arguments):
        made = make(*arguments)
        seeds["batches"] = made.seed
        return made

    monkeypatch.setattr(loop, "evaluate", sampled)
    monkeypatch.setattr(loop, "make_batches", batches)
    train(config, tmp_path)
    assert seeds == dict.fromkeys(("build", "init_state", "validation", "batches"), 77)


@pytest.mark.parametrize("rule", TIES)
def test_the_figures_of_the_test_are_those_of_its_ranks(rule, dataset, tmp_path, monkeypatch):
    """The standard errors, too, must be those of the rule for equal scores."""
    ranks, ties = np.array([0, 1, 1, 12]), np.array([9, 0, 29, 0])
    scripted(monkeypatch, [0.1])
    monkeypatch.setattr(loop, "rank_targets", lambda *_, **__: (ranks, ties))
    config = quick_config(dataset, epochs=1)
    config.eval.ties = rule
    result = train(config, tmp_path)
    of_users = ranks[1:], result["protocol"]["ks"], ties[1:] if rule == "expected" else None
    assert result["users"] == 3
    assert result["test"] == metrics(*of_users)
    assert result["test_standard_errors"] == standard_errors(*of_users)


def test_a_logger_hears_of_each_start_and_of_the_end(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, "calls", calls := [])
    config = quick_config(dataset, epochs=2)
    config.train.loggers = f"tensorboard,{Recorder.__module__}:Recorder"
    scripted(monkeypatch, [0.1])
    run = dispatch.HostSteps.run
    with monkeypatch.context() as patch:

        def signalled(self, state):
            if last_of_epoch(self, state):
                signal.raise_signal(signal.SIGTERM)
            return run(self, state)

        patch.setattr(dispatch.HostSteps, "run", signalled)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path)
    scripted(monkeypatch, [0.2])
    config.train.loggers = (
        f"{Recorder.__module__}:Recorder"  # may change: the training stays the same
    )
    result = train(config, tmp_path)
    named = [call for call in calls if call[0] != "log"]
    step = named[2][3]
    assert named == [
        ("start", 2, tmp_path, 0),
        ("finish", None),
        ("start", 2, tmp_path, step),
        ("finish", result),
    ]
    logged = [call for call in calls if call[0] == "log"]
    valid = [call for call in logged if "valid/ndcg@10" in call[1]]
    assert [(call[1]["valid/ndcg@10"], call[2]) for call in valid] == [(0.1, step), (0.2, 2 * step)]
    assert any("test/ndcg@10" in call[1] for call in logged)
    assert list((tmp_path / "tensorboard").iterdir())


def test_batches_are_spread_over_all_devices(dataset, tmp_path, monkeypatch, all_devices):
    """What they compute there: `test_eight_devices_give_the_parameters_of_one` in test_step."""
    config = quick_config(dataset, epochs=1)
    scripted(monkeypatch, [0.1, 0.2])
    ran_on = []

    def step(state, batch, *_):
        ran_on.append({len(array.sharding.device_set) for array in batch.values()})
        return state.replace(step=state.step + 1, weight_sum=state.weight_sum + 1), {
            "loss": state.loss_sum,
            "bad_step": state.bad_step,
        }

    monkeypatch.setattr(dispatch, "train_step", step)
    monkeypatch.setattr(dispatch.HostSteps, "lowered", lambda *_: ())
    train(config, tmp_path / "eight")
    assert set(map(tuple, ran_on)) == {(8,)}


def test_a_loss_that_is_not_finite_stops_with_the_state_before_it(dataset, tmp_path):
    config = quick_config(dataset, learning_rate=1e30)
    for _ in range(2):  # the same command again has nothing else to say
        with pytest.raises(UserError, match=r"not finite at step 1 .* lower config\.train"):
            train(config, tmp_path)
    checkpoints = loop.Checkpoints(tmp_path)
    model = build(config.model, n_items=30, max_length=MAX_LENGTH)
    state = loop.init_state(nnx.state(model, nnx.Param), make_optimizer(1e30, 0.0), 0)
    batches = TrainBatches(
        open_dataset(dataset), max_length=12, batch_size=16, seed=0, convention="exact"
    )
    state, _ = checkpoints.restore(state, train_iterator(batches))
    checkpoints.close()
    assert int(state.bad_step) == 1
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
    assert not (tmp_path / "metrics.json").exists()


@pytest.fixture
def copied(finished, dataset, tmp_path):
    """Copies of a finished run, and its settings for a copy of its dataset."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run", quick_config(dataset, epochs=8, learning_rate=0.01)


def test_other_settings(copied):
    workdir, config = copied
    config.model.repeat_bias, config.train.epochs = True, 20
    words = r"model.repeat_bias \(False -> True\), train.epochs \(8 -> 20\); choose another --workd"
    with pytest.raises(UserError, match=words):
        train(config, workdir)


def test_damaged_settings(copied):
    workdir, config = copied
    (workdir / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON .*; restore it"):
        train(config, workdir)


def test_another_dataset_in_the_same_place(tmp_path, monkeypatch):
    """Another number of items, and as many other events."""
    config = quick_config(tmp_path / "data", epochs=1)
    write_dataset(tmp_path / "data", random_histories([8] * 4))
    scripted(monkeypatch, [0.1])
    train(config, tmp_path / "run")
    for what, seed, n_items in (("items", 0, 31), ("items, sequences", 1, 30)):
        shutil.rmtree(tmp_path / "data")
        write_dataset(tmp_path / "data", random_histories([8] * 4, seed=seed), n_items=n_items)
        with pytest.raises(UserError, match=rf"not the dataset that the run .* \(other {what}\)"):
            train(config, tmp_path / "run")


def test_a_worker_thread_trains_too(dataset, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.2])
    with ThreadPoolExecutor(1) as pool:
        figures = pool.submit(train, quick_config(dataset), tmp_path / "run").result()
    assert figures["epochs"] == 2


def test_an_end_before_the_first_step_leaves_nothing_behind(dataset, tmp_path, monkeypatch):
    def interrupted(*_):
        assert list(tmp_path.glob("*/config.json"))
        raise KeyboardInterrupt

    config = quick_config(dataset)
    monkeypatch.setattr(dispatch.HostSteps, "lowered", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "notes")
    assert {path.name for path in (tmp_path / "notes").iterdir()} == {"mine.txt", ".lock"}


def test_two_at_once(dataset, tmp_path):
    with only_process(tmp_path), pytest.raises(UserError, match="another process is training"):
        train(tiny_config(dataset), tmp_path)


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_run_directory_that_cannot_be(dataset, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        train(tiny_config(dataset), tmp_path / name)
