"""A run directory, of this version and of an older one."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tim4rec_jax.data import open_dataset
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate
from tim4rec_jax.evaluation.evaluate import batch_settings
from tim4rec_jax.run import check_unchanged, load_model, read_date_range, read_settings
from tim4rec_jax.serving import Recommender
from tim4rec_jax.training.train import train


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A folder with an old run, stopped after two of three epochs, and its dataset.

    Version 0.1.0 made it with `configs/ml100k.py:causal`, `seen_offset=True`, `drift_knots=4`, a
    width of 8, and `train.learning_rate=.03`, on eight random histories. Then it computed what
    `expected.json` holds.
    """
    with tarfile.open(Path(__file__).parent / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_settings_of_an_old_run(old):
    path = old / "run" / "config.json"
    config = read_settings(path)
    assert config.model.repeat_bias and config.model.date_bias_knots == 4
    assert "seen_offset" not in config.model and "drift_dates" not in config.model
    assert read_date_range(old / "run") == (880_000_000, 880_002_010)
    check_unchanged(config, path)
    config.train.epochs = 4
    with pytest.raises(UserError, match=r"other settings: train.epochs \(3 -> 4\)"):
        check_unchanged(config, path)


def test_an_old_run_scores_and_goes_on_as_before(old):
    expected = json.loads((old / "expected.json").read_text())
    config, model = load_model("run")
    figures, ranks = evaluate(model, open_dataset("data"), "test", **batch_settings(config))
    assert ranks.tolist() == expected["ranks"]
    assert figures == pytest.approx(expected["eval"])
    found = Recommender.load("run").recommend(
        ["i3", "i5", "i9"], [880_000_000, 880_000_100, 880_000_400], k=5
    )
    assert found.items == expected["items"]
    # Sums of eight float32 products, scores of about 0.4.
    np.testing.assert_allclose(found.scores, expected["scores"], rtol=1e-5)
    assert train(config, Path("run"))["test"] == pytest.approx(expected["resumed_test"])
    log = [json.loads(line) for line in (old / "run" / "log.jsonl").read_text().splitlines()]
    log = [record for record in log if record["kind"] == "valid"]
    assert [record["ndcg@10"] for record in log] == pytest.approx(expected["resumed_ndcg"])
    # Means over 47 losses in float32, the last one after two more updates by Adam.
    losses = [record["train_loss"] for record in log]
    np.testing.assert_allclose(losses, expected["resumed_train_loss"], rtol=1e-4)


def test_no_run_directory(tmp_path):
    with pytest.raises(UserError, match=r"is no run directory: it has no config.json"):
        load_model(tmp_path)
