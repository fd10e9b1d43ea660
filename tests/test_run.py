"""A run directory, of this version and of an older one."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.small_dataset import random_histories, write_dataset
from tests.serving.tiny_run import save_run
from tim4rec_jax.data import open_dataset
from tim4rec_jax.digests import digests
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation import evaluate
from tim4rec_jax.evaluation.evaluate import batch_settings
from tim4rec_jax.run import (
    check_unchanged,
    claim,
    load_model,
    only_process,
    read_date_range,
    read_figures,
    read_settings,
    write_settings,
)
from tim4rec_jax.serving import Recommender
from tim4rec_jax.training.train import train
from tim4rec_jax.verify import verify


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
    config.train.checkpoint_minutes, config.data.placement, config.eval.batch_size = 60.0, "host", 7
    check_unchanged(config, path)  # they change no result
    config.train.epochs = 4
    with pytest.raises(UserError, match=r"other settings: train.epochs \(3 -> 4\)"):
        check_unchanged(config, path)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_setting_for_a_single_layer(old, layers):
    path = old / "run" / "config.json"
    config = read_settings(path)
    config.model.num_layers = layers
    write_settings(config, path)
    config.model.single_layer_residual = True
    if layers > 1:
        check_unchanged(config, path)
    else:
        with pytest.raises(UserError, match=r"settings: model.single_layer_residual \(False -> T"):
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


def test_an_old_run_has_no_digests(old, capsys):
    load_model("run")
    assert "is of an earlier version, which kept no digests" in capsys.readouterr().err
    findings = verify("run")
    assert not [finding for finding in findings if finding.problem]
    notes = {str(finding.part): finding.note for finding in findings}
    assert (
        notes["run/best/2"]
        == notes["run/checkpoints/4"]
        == ("of an earlier version, which kept no digests")
    )


def test_a_value_that_has_changed_is_found(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_histories([3, 4, 5]))
    workdir = save_run(tmp_path / "run", dataset)
    assert not [finding for finding in verify(workdir) if finding.problem]
    file = workdir / "best" / "1" / "digests" / "arrays.json"
    recorded = json.loads(file.read_text())
    name = "item_embedding/embedding"
    file.write_text(json.dumps(recorded | {name: "0" * 64}))
    with pytest.raises(UserError, match=f"the values of {name} are not those that were saved"):
        load_model(workdir)
    problems = [finding for finding in verify(workdir) if finding.problem]
    assert problems[0].part == workdir / "best" / "1"
    assert f"best/1 is damaged: the values of {name}" in problems[0].problem


def test_nobody_waits_for_a_pipe(tmp_path):
    workdir = save_run(tmp_path / "run", write_dataset(tmp_path / "d", random_histories([3, 4])))
    pipe = next((workdir / "best" / "1" / "default").glob("**/process_0"))
    pipe.unlink()
    os.mkfifo(pipe)
    says = f"{pipe.relative_to(workdir / 'best' / '1')} is neither a file nor a folder"
    with pytest.raises(UserError, match=says):
        load_model(workdir)
    assert says in str([finding.problem for finding in verify(workdir) if finding.problem])


def test_a_pipe_in_the_place_of_a_lock(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    with only_process(tmp_path):
        pass


def test_the_folder_of_a_dataset_is_no_run_directory(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_histories([3, 4]))
    config = read_settings(save_run(tmp_path / "run", dataset) / "config.json")
    before = sorted(path.name for path in dataset.iterdir())
    with (
        pytest.raises(UserError, match="is the folder of the dataset; choose another"),
        claim(dataset, config, open_dataset(dataset)),
    ):
        pass
    assert sorted(path.name for path in dataset.iterdir()) == before


def test_a_start_that_fails_removes_what_it_wrote_and_no_more(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_histories([3, 4]))
    config = read_settings(save_run(tmp_path / "run", dataset) / "config.json")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "date_range.json").write_text("mine")
    with (
        pytest.raises(KeyboardInterrupt),
        claim(tmp_path / "new", config, open_dataset(dataset)),
    ):
        assert (tmp_path / "new" / "config.json").exists()
        raise KeyboardInterrupt
    left = {path.name for path in (tmp_path / "new").iterdir()}
    assert left == {".lock", "date_range.json"}


def test_a_start_that_was_killed_before_its_first_step_blocks_no_settings(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_histories([3, 4]))
    config = read_settings(save_run(tmp_path / "run", dataset) / "config.json")
    (tmp_path / "new").mkdir()
    write_settings(config, tmp_path / "new" / "config.json")
    config.train.learning_rate *= 2
    check_unchanged(config, tmp_path / "new" / "config.json")
    with claim(tmp_path / "new", config, open_dataset(dataset)):
        kept = read_settings(tmp_path / "new" / "config.json").train.learning_rate
        assert kept == config.train.learning_rate


def test_a_run_goes_on_where_its_dataset_lies_now(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_histories([3, 4]))
    run = save_run(tmp_path / "run", dataset)
    config = read_settings(run / "config.json")
    config.dataset = str(dataset.rename(tmp_path / "moved"))
    check_unchanged(config, run / "config.json")
    with claim(run, config, open_dataset(tmp_path / "moved")):
        pass
    assert read_settings(run / "config.json").dataset == config.dataset


def test_what_another_process_has_trained_meanwhile_is_kept(tmp_path):
    dataset = write_dataset(tmp_path / "data", random_histories([3, 4]))
    run = save_run(tmp_path / "run", dataset)
    (run / "metrics.json").write_text("{}")
    config = read_settings(run / "config.json")
    config.train.learning_rate *= 2
    with (
        pytest.raises(UserError, match=r"other settings: train\.learning_rate"),
        claim(run, config, open_dataset(dataset)),
    ):
        pass
    assert (run / "metrics.json").exists()
    # Nor is a run taken over whose settings are gone.
    (run / "config.json").unlink()
    with (
        pytest.raises(UserError, match=r"config\.json is missing, and .* holds a run; restore it"),
        claim(run, config, open_dataset(dataset)),
    ):
        pass
    assert not (run / "config.json").exists()


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"users": NaN}', '{"test": 1}'])
def test_figures_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "metrics.json"
    os.mkfifo(path) if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json .*; delete it and go on"):
        read_figures(tmp_path)


def test_the_dates_of_a_date_bias_are_needed(tmp_path):
    dataset = write_dataset(tmp_path / "d", random_histories([3, 4]))
    kind = dict(time_encoding="causal", date_bias_knots=2, date_range=(10**8, 10**9))
    workdir = save_run(tmp_path / "run", dataset, **kind)
    path = workdir / "date_range.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"last": values["last"] + 1}))
    with pytest.raises(UserError, match=r"date_range\.json does not hold the values"):
        load_model(workdir)
    path.unlink()
    with pytest.raises(UserError, match=r"date_range\.json is missing; restore it"):
        load_model(workdir)


def test_arrays_that_differ_in_anything_have_other_digests():
    zeros = np.zeros((2, 3), np.float32)
    others = [zeros.T, zeros.astype(np.int32), zeros[:1], -zeros, zeros.reshape(-1)]
    found = [digests({"a": [array]})["a/0"] for array in [zeros, *others]]
    assert len(set(found)) == 6
    assert digests({"a": [zeros.T.copy().T]})["a/0"] == found[0]  # however it lies in memory


def test_settings_that_have_changed_are_found(tmp_path):
    workdir = save_run(tmp_path / "run", write_dataset(tmp_path / "d", random_histories([3, 4])))
    path = workdir / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"dataset": "moved"}))  # which is allowed
    assert read_settings(path).dataset == "moved"
    values["data"]["max_length"] += 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"config\.json does not hold the values that were written"):
        read_settings(path)


def test_no_run_directory(tmp_path):
    with pytest.raises(UserError, match=r"is no run directory: it has no config.json"):
        load_model(tmp_path)
