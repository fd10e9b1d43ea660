"""A model outside the package, named as `module:Class`."""

import sys

import pytest

from tests.serving.tiny_run import save_run, tiny_dataset
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import MODELS, build, find_model, model_settings
from tim4rec_jax.run import load_model

MODULE = """
from tim4rec_jax.models.gru4rec import GRU4Rec

class Mine(GRU4Rec):
    default_patience = 3

class NoModel:
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Makes the module `own_model_of_a_test` importable; gives the folder."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "own_model_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield
    sys.modules.pop("own_model_of_a_test", None)


def test_a_run_imports_its_model(own_module, tmp_path, monkeypatch):
    dataset = tiny_dataset(tmp_path / "data")
    workdir = save_run(tmp_path / "run", dataset, name="own_model_of_a_test:Mine")
    del sys.modules["own_model_of_a_test"]  # as in a process that has only the run directory
    config, model = load_model(workdir)
    assert type(model).__name__ == "Mine"
    assert config.train.patience == 3
    del sys.modules["own_model_of_a_test"]
    monkeypatch.undo()
    with pytest.raises(UserError, match="PYTHONPATH") as error:
        load_model(workdir)
    assert "own_model_of_a_test" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sasrek", "must be one of tim4rec.*module:Class"),
        ("own_model_of_a_test:NoModel", "no subclass of SequenceModel"),
        ("own_model_of_a_test:Missing", "cannot be imported.*Missing"),
        ("no_such_module:Model", "cannot be imported.*no_such_module"),
    ],
)
def test_what_is_no_model(own_module, name, words):
    with pytest.raises(ValueError, match=words):
        find_model(name)


@pytest.mark.parametrize("name", MODELS)
def test_a_setting_that_is_not_known_is_refused(name):
    with pytest.raises(ValueError, match=f"hiden_size is no setting of {name}; it has dtype, "):
        build({"name": name, "hiden_size": 8}, n_items=3, max_length=4)
    assert model_settings({"name": name}) == MODELS[name].Settings()
