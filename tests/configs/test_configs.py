"""Every configuration in every variant: its settings are those of record, and its model builds."""

import ast
import json
import re
import runpy
from pathlib import Path

import jax
import pytest
from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax import presets
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import MODELS, build

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.py"))
# The settings that each variant had when the figures in the docstrings were measured: the
# settings of every run, those of every model, and for each variant what differs from these.
RECORD = json.loads((Path(__file__).parent / "resolved.json").read_text())


def variants(path):
    """The variants of its own that a file checks its argument against."""
    text = re.search(r"check_variant\(variant, (.*?)\)", path.read_text()).group(1)
    return ast.literal_eval(f"({text},)")


CASES = [(path, variant) for path in FILES for variant in ("", *variants(path))]


def get_config(path, variant):
    return runpy.run_path(str(path))["get_config"](variant)


def test_the_configs_are_there():
    names = {"beauty", "kuairand", "ml100k", "ml1m", "own", "quickstart", "steam"}
    assert names <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_settings_of_record(path):
    for variant in ("", *variants(path), *presets.baselines()):
        found = config_lib.flatten(config_lib.resolve(get_config(path, variant)))
        differences = RECORD["differences"][f"{path.stem}:{variant}".removesuffix(":")]
        name = differences.get("model.name", "tim4rec")
        model = {f"model.{key}": value for key, value in RECORD["models"][name].items()}
        expected = RECORD["run"] | {"model.name": name} | model | differences
        found = json.loads(json.dumps(found))  # makes lists of tuples
        # A setting that came later has the value that changes nothing.
        assert found.pop("model.conv_path", "") == ""
        assert not found.pop("data.shuffle_ties")
        assert not found.pop("model.neighbours") and found.pop("model.neighbour_weight")
        assert not found.pop("model.neighbours_follow") and not found.pop("model.repeat_last")
        assert not found.pop("model.ssd_norm_eps", 0)
        alone = found.pop("model.single_layer_residual", False)
        assert not alone or found["model.num_layers"] > 1
        # No dataset of these configurations has item features.
        assert found.pop("model.item_features") and found.pop("model.id_dropout")
        assert found == expected, variant


@pytest.mark.parametrize(("path", "variant"), CASES, ids=lambda part: getattr(part, "stem", part))
def test_builds(path, variant):
    config = config_lib.resolve(get_config(path, variant))
    length = config.data.max_length
    model = nnx.eval_shape(
        lambda: build(config.model, n_items=100, max_length=length, date_range=(0, 1))
    )
    batch = [
        jax.ShapeDtypeStruct((2, length), "int32"),
        jax.ShapeDtypeStruct((2,), "int32"),
        jax.ShapeDtypeStruct((2, length), "float32"),
    ]
    graph, params = nnx.split(model)
    hidden = jax.eval_shape(lambda params, *b: nnx.merge(graph, params).encode(*b), params, *batch)
    assert hidden.shape == (2, config.model.hidden_size)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_says_how_to_prepare_and_train(path):
    module = runpy.run_path(str(path))
    config, text = module["get_config"](""), module["__doc__"]
    assert config.prepare in text
    assert config.prepare.endswith(f"--out {config.dataset}")
    assert f"python train.py --config configs/{path.name} --workdir runs/" in text
    for variant in variants(path):
        assert re.search(rf"(`{variant}`|^ +{variant} )", text, re.MULTILINE), variant


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_variant_there_is_not(path):
    with pytest.raises(ValueError, match=r"'nosuch' is not a variant; there are: .*official"):
        get_config(path, "nosuch")


def test_every_model_but_the_default_is_a_variant():
    assert {*presets.baselines(), "tim4rec"} == set(MODELS)


@pytest.mark.parametrize(
    ("named", "file", "variant"),
    [
        ("configs/beauty.py:causal", "beauty.py", "causal"),
        ("beauty", "beauty.py", ""),
        ("beauty:sasrec", "beauty.py", "sasrec"),
        ("causal", "own.py", "causal"),
        ("tim4rec", "own.py", ""),
        ("gru4rec", "own.py", "gru4rec"),
    ],
)
def test_names(named, file, variant, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    path, found = presets.find(named)
    assert (path.resolve(), found) == (FOLDER / file, variant)


@pytest.mark.parametrize("named", ["beuaty", "configs/nosuch.py", "causal:causal", ".", "__init__"])
def test_a_name_there_is_not(named):
    with pytest.raises(UserError, match=r"there is no file .* by name there are beauty, kuairand"):
        presets.find(named)
