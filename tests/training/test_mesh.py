"""Trainings on a mesh of devices: the same figures, checkpoints that move between topologies."""

import json

import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tests.training.tiny_run import die_at, quick_config
from tim4rec_jax.errors import UserError
from tim4rec_jax.run import load_model
from tim4rec_jax.training.train import train

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, random_histories([20] * 12, n_items=29))
    return folder


def records(workdir):
    lines = (workdir / "log.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "valid"]


def config_of(dataset, mesh=(None, 1), **train):
    config = quick_config(dataset, **{"epochs": 2} | train)
    config.model.repeat_bias = True
    config.mesh.data, config.mesh.catalogue = mesh
    return config


def test_a_training_on_a_mesh_and_its_end_elsewhere(dataset, tmp_path, monkeypatch):
    """Losses and figures are those of one device; stopped on 2 x 4 devices, it ends on one."""
    settings = dict(loss="sampled_softmax", negatives=12)
    one = train(config_of(dataset, **settings), tmp_path / "one")
    with monkeypatch.context() as patch:
        die_at(len(range(0, 14)) + 1, patch)
        with pytest.raises(RuntimeError, match="killed"):
            train(config_of(dataset, (2, 4), **settings), tmp_path / "mesh")
    again = train(config_of(dataset, (1, 1), **settings), tmp_path / "mesh")
    assert len(records(tmp_path / "mesh")) == 2
    for ours, theirs in zip(*(records(tmp_path / name) for name in ("mesh", "one")), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    assert again["test"] == pytest.approx(one["test"], rel=1e-5)


def test_a_validation_of_some_users_between_epochs(dataset, tmp_path):
    config = config_of(dataset, (2, 2), loss="bpr", item_optimizer="adagrad", epochs=1)
    config.eval.update(valid_users=5, valid_steps=5)
    train(config, tmp_path)
    assert [record["step"] for record in records(tmp_path)] == [5, 10, 13]
    # Hits are counted for five users.
    assert {round(5 * record["hit@10"], 6) % 1 for record in records(tmp_path)} == {0.0}
    model = load_model(tmp_path)[1]
    assert model.n_items == 30
    assert model.item_embedding.embedding.shape == (31, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mesh.data": 3}, "16 rows cannot be shared by config.mesh.data=3"),
        ({"mesh.data": 16}, "asks for 16 x 1 devices, and there are 8"),
        ({"train.item_optimizer": "adagrad"}, "has a gradient for every row"),
        ({"mesh.catalogue": 2, "train.loss": "os:path"}, "needs the whole item table"),
        (
            {"mesh.catalogue": 2, "model.repeat_bias": True, "model.repeat_last": True},
            "repeat_last has a number for each item",
        ),
        ({"model.repeat_last": True}, "repeat_last is True, which needs repeat_bias=True"),
        ({"eval.valid_epochs": 2, "eval.valid_steps": 2}, "set one of them"),
    ],
)
def test_what_cannot_be(dataset, settings, words, tmp_path):
    config = quick_config(dataset)
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=words):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
