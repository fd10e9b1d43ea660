"""Ranges of settings: what they mean, and what is refused with which words."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from tim4rec_jax import config as config_lib
from tim4rec_jax.commands.search_space import default_space, make_space, read_space
from tim4rec_jax.errors import UserError
from tim4rec_jax.models import MODELS
from tim4rec_jax.presets import load_config

CONFIG = config_lib.default()


def test_what_ranges_mean():
    words = {
        "train.learning_rate": "log:1e-4:1e-2",
        "model.dropout_prob": "0:0.5",
        "model.num_layers": "1:4",
        "model.hidden_size": "log:16:256",
        "train.batch_size": "32, 64",
        "model.is_time": "true,False",
        "train.schedule": "constant,cosine",
    }
    assert make_space(words, CONFIG) == {
        "train.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "model.dropout_prob": FloatDistribution(0.0, 0.5),
        "model.num_layers": IntDistribution(1, 4),
        "model.hidden_size": IntDistribution(16, 256, log=True),
        "train.batch_size": CategoricalDistribution((32, 64)),
        "model.is_time": CategoricalDistribution((True, False)),
        "train.schedule": CategoricalDistribution(("constant", "cosine")),
    }


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("model.dropout", "0:0.5", "model.dropout is not a setting; nearest: .*model.dropout_prob"),
        ("model.hiden_size", "1,2", "nearest: model.hidden_size"),
        ("dropout_prob", "0:0.5", "dropout_prob is not a setting; nearest: model.dropout_prob"),
        ("dataset", "a,b", "dataset cannot be searched"),
        ("seed", "1,2", "seed cannot be searched"),
        ("model.name", "sasrec,hstu", "model.name cannot be searched"),
        ("data.split", "leave_one_out,global_time", "data.split cannot be searched"),
        ("eval.batch_size", "1:2", "eval.batch_size cannot be searched"),
        ("train.learning_rate", "1e-2:1e-4", "the lower end must come first"),
        ("train.learning_rate", "1e-3", "write LOW:HIGH, log:LOW:HIGH or A,B,C"),
        ("train.learning_rate", "log:1e-3", "write LOW:HIGH"),
        ("train.learning_rate", "1e-3,1e-3", "write LOW:HIGH"),
        ("train.learning_rate", "0:0.1", "is 0.0; it must be positive"),
        ("train.weight_decay", "log:0:0.1", "one with log: must begin above 0"),
        ("train.learning_rate", "1e-4:inf", "its numbers must be finite"),
        ("train.learning_rate", "1e-4:nan", "its numbers must be finite"),
        ("train.learning_rate", "1:2:3", "write LOW:HIGH"),
        ("train.learning_rate", "", "write LOW:HIGH"),
        ("train.learning_rate", "1,two", "'two' is no number"),
        ("train.learning_rate", "small:big", "'small' is no number"),
        ("model.num_layers", "1:2.5", "'2.5' is no whole number"),
        ("model.num_layers", "0:2", "is 0; it must be positive, and at most 1000"),
        ("model.dropout_prob", "0.5:1", r"is 1.0; it must lie in \[0, 1\)"),
        ("model.is_time", "yes,no", "it must be True or False"),
        ("model.time_encoding", "paper,causl", "it must be one of paper, masked, causal"),
        ("data.buckets", "1,2", "data.buckets cannot be searched"),
    ],
)
def test_mistakes(name, words, says):
    with pytest.raises(UserError, match=says):
        make_space({name: words}, CONFIG)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_the_same_knobs(model):
    config = config_lib.default()
    config_lib.use_model(config, model)
    space = make_space(default_space(config), config)
    if model == "popularity":  # learns nothing
        assert not space
        return
    last = {name.rpartition(".")[2] for name in space}
    assert {"learning_rate", "weight_decay"} < last
    assert last & {"hidden_size", "embedding_size"}
    assert last & {"dropout_prob", "hidden_dropout_prob"}
    assert model == "caser" or last & {"num_layers", "n_layers"}
    given = default_space(config, ["--config=x", "--config.train.weight_decay=0.1"])
    assert set(space) - set(given) == {"train.weight_decay"}


def test_ranges_in_a_file(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text("train.learning_rate: log:1e-4:1e-2\nmodel.num_layers: [1, 2]\n")
    assert read_space(path) == {
        "train.learning_rate": "log:1e-4:1e-2",
        "model.num_layers": "1,2",
    }
    for text, says in (
        ("- 1\n", "must hold lines"),
        ("", "must hold lines"),
        ("a: [", "is no YAML file"),
        ("\0", "is no YAML file"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            read_space(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_space(tmp_path)


def test_named_configurations_hold_in_their_own_space():
    """The first trial has the settings of the configuration."""
    config = load_config("ml100k:causal")
    space = make_space(default_space(config), config)
    flat = config_lib.flatten(config)
    for name, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            assert flat[name] in distribution.choices
        else:
            assert distribution.low <= flat[name] <= distribution.high
