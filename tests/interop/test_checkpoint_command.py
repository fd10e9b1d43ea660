"""`python -m tim4rec_jax.interop`: a checkpoint becomes a run that evaluates."""

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from tests.data.small_dataset import random_histories, write_dataset
from tests.interop.golden_models import read_golden
from tests.interop.torch_format import recbole_checkpoint, torch_save
from tim4rec_jax.errors import UserError
from tim4rec_jax.evaluation.evaluate_run import evaluate_run
from tim4rec_jax.interop import to_torch
from tim4rec_jax.interop.__main__ import main
from tim4rec_jax.run import load_model


@pytest.fixture(scope="module")
def golden():
    return read_golden("tiny_h8_hswish_p2pT")


@pytest.fixture
def checkpoint(tmp_path, golden):
    saved = recbole_checkpoint(golden.state_dict, golden.config)
    return torch_save(saved, tmp_path / "TiM4Rec.pth")


def test_the_run_holds_the_weights_and_settings(tmp_path, golden, checkpoint, capsys):
    main([str(checkpoint), "--workdir", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "ssd_layers.1.ssd.conv1d.weight (48, 1, 4) -> blocks.1.ssd.conv.kernel" in printed
    assert "65 parameters, 39 items, histories of 12 events" in printed
    assert "10,864 parameters" in printed

    config, model = load_model(tmp_path / "run")
    assert config.model.conv_path == "hardswish"
    assert config.data.max_length == 12
    assert config.data.convention == "recbole"
    for name, value in to_torch(model).items():
        np.testing.assert_array_equal(value, golden.state_dict[name])


def test_the_run_evaluates(tmp_path, capsys):
    golden = read_golden("tiny_notime_1layer_noffn")
    saved = recbole_checkpoint(golden.state_dict, golden.config)
    checkpoint = torch_save(saved, tmp_path / "TiM4Rec.pth")
    histories = random_histories([5, 9, 20], n_items=39)
    dataset = write_dataset(tmp_path / "data", histories, n_items=39, order="recbole")
    main([str(checkpoint), "--workdir", str(tmp_path / "run"), "--dataset", str(dataset)])
    assert "note:" not in capsys.readouterr().out
    assert evaluate_run(tmp_path / "run")["users"] == 3


def test_a_bare_state_dict_needs_its_yaml_file(tmp_path, golden, capsys):
    path = torch_save(golden.state_dict, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights.pth: the configuration lacks hidden_size"):
        main([str(path), "--workdir", str(tmp_path / "run")])
    settings = tmp_path / "config.yaml"
    settings.write_text(yaml.safe_dump(golden.config))
    main([str(path), "--workdir", str(tmp_path / "run"), "--config", str(settings)])
    assert "evaluate it: python eval.py" in capsys.readouterr().out
    assert load_model(tmp_path / "run")[1].n_items == 39


def test_double_precision_weights_are_rounded(tmp_path, golden):
    weights = {name: value.astype(np.float64) for name, value in golden.state_dict.items()}
    path = torch_save(recbole_checkpoint(weights, golden.config), tmp_path / "double.pth")
    main([str(path), "--workdir", str(tmp_path / "run")])
    assert load_model(tmp_path / "run")[1].item_embedding.embedding.dtype == jnp.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_items": 10**12}, "makes a model of 16,000"),
        ({"n_items": "x"}, "n_items is 'x': expected int"),
        ({"n_items": -5}, "n_items is -5, the padding included"),
        ({"hidden_size": 16.5}, "hidden_size is 16.5: expected int"),
        ({"norm_eps": float("nan")}, "norm_eps is nan: expected float"),
        ({"hidden_size": 10**400}, "hidden_size is 1000"),
        ({"hidden_size": ["x"] * 9}, "hidden_size is a list: expected int"),
        ({"model": ["TiM4Rec"]}, "model is a list: readable are"),
        ({"conv_path": 3}, "conv_path is 3: expected str"),
    ],
)
def test_settings_that_make_no_model(tmp_path, golden, change, message):
    path = torch_save(recbole_checkpoint(golden.state_dict, golden.config | change), tmp_path / "x")
    with pytest.raises(UserError, match=message) as error:
        main([str(path), "--workdir", str(tmp_path / "run")])
    assert len(str(error.value)) < 400
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_weights_that_are_not_finite(tmp_path, golden, value):
    bias = golden.state_dict["layer_norm_time.bias"]
    weights = golden.state_dict | {"layer_norm_time.bias": np.full(bias.shape, value)}
    path = torch_save(recbole_checkpoint(weights, golden.config), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"layer_norm_time\.bias holds values that are not finite"):
        main([str(path), "--workdir", str(tmp_path / "run")])


def test_a_used_run_directory_is_left_alone(tmp_path, checkpoint):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    with pytest.raises(UserError, match="not an empty directory"):
        main([str(checkpoint), "--workdir", str(tmp_path / "run")])


def test_a_dataset_with_other_items(tmp_path, checkpoint):
    dataset = write_dataset(tmp_path / "data", random_histories([5, 9]))
    with pytest.raises(UserError, match=r"knows 39 items and .* has 30"):
        main([str(checkpoint), "--workdir", str(tmp_path / "run"), "--dataset", str(dataset)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("a: [1", "is no YAML file"),
        ("- 1\n- 2\n", "holds no settings"),
        ("a: " + "[" * 50_000, "is no YAML file"),
        ("a: 2020-99-99", "is no YAML file"),
        ("a: 1" + " " * 2**20, "is no YAML file: File too large|is larger"),
    ],
)
def test_a_config_file_that_cannot_be_used(tmp_path, checkpoint, content, message):
    settings = tmp_path / "config.yaml"
    if content is not None:
        settings.write_text(content)
    flags = ["--workdir", str(tmp_path / "run"), "--config", str(settings)]
    with pytest.raises(UserError, match=message) as error:
        main([str(checkpoint), *flags])
    assert "\n" not in str(error.value)
