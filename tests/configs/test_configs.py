"""Every configuration, in every variant it documents, builds its model."""

import re
import runpy
from pathlib import Path

import jax
import pytest
from flax import nnx

from tim4rec_jax import config as config_lib
from tim4rec_jax.models import build

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.py"))


def variants(path):
    """Those the file checks its argument against."""
    text = re.search(r"check_variant\(variant, \((.*?)\)\)", path.read_text()).group(1)
    return re.findall(r'"(.+?)"', text)


CASES = [(path, variant) for path in FILES for variant in ("", *variants(path))]


def test_the_configs_are_there():
    names = {"beauty", "kuairand", "ml100k", "ml1m", "quickstart", "steam"}
    assert names <= {path.stem for path in FILES}


@pytest.mark.parametrize(("path", "variant"), CASES, ids=lambda part: getattr(part, "stem", part))
def test_builds(path, variant):
    config = config_lib.resolve(runpy.run_path(str(path))["get_config"](variant))
    length = config.data.max_length
    model = nnx.eval_shape(lambda: build(config.model, n_items=100, max_length=length))
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
        runpy.run_path(str(path))["get_config"]("nosuch")
