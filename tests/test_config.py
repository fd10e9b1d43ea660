"""What settings can be, and what follows from them."""

import pytest

from tim4rec_jax import config as config_lib
from tim4rec_jax.errors import UserError


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model.name", "tim5rec", "must be one of tim4rec"),
        ("model.time_encoding", "casual", "must be one of paper, masked, causal"),
        ("model.dtype", "float16", "must be one of float32, bfloat16"),
        ("train.objective", "every", "must be one of prefix, every_position, cloze"),
        ("train.objective", "every_position", "needs a causal model"),
        ("model.knows_next_time", True, "needs config.model.time_encoding=causal"),
        ("train.schedule", "linear", "must be one of constant, cosine"),
        ("data.windows_per_user", 0, "must be positive"),
        ("data.buckets", ("short", 50), "must be whole numbers"),
        ("data.valid_from", "2003-01-01", "which the split leave_one_out does not use"),
        ("data.test_from", "2003-01-01", "which the split leave_one_out does not use"),
        ("data.valid_from", "soon", "must be an ISO date"),
        ("data.test_from", str(2**63), "must be an ISO date"),
        ("data.windows_per_user", 2, "which the objective prefix does not use"),
        ("data.shuffle_ties", True, "which the objective prefix does not use"),
        ("seed", 2**32, "must be less than 2^32"),
        ("train.epochs", 10**30, "must be less than 2^32"),
        ("train.learning_rate", float("inf"), "float32"),
        ("train.learning_rate", 1e39, "float32"),
        ("train.learning_rate", 1e-60, "float32"),
        ("train.checkpoint_minutes", float("nan"), "must not be negative"),
        ("model.hidden_size", 2**40, "must be less than 2^32"),
        ("model.num_layers", 10**6, "must be positive, and at most 1000"),
        ("model.norm_eps", float("inf"), "float32"),
        ("data.convention", "fuzzy", "must be one of recbole, exact"),
        ("model.dropout_prob", 1.0, "must lie in [0, 1)"),
        ("model.time_drop_out", -0.1, "must lie in [0, 1)"),
        ("train.learning_rate", float("nan"), "must be positive"),
        ("train.epochs", 0, "must be positive"),
        ("train.calibration", 1.5, "must lie in [0, 1]"),
        ("model.d_conv", 0, "must be positive"),
        ("model.norm_eps", 0.0, "must be positive"),
        ("seed", -1, "must not be negative"),
        ("train.patience", -1, "must not be negative"),
        ("model.head_dim", 48, "must divide expand * hidden_size = 128"),
    ],
)
def test_settings_that_cannot_be(key, value, words):
    config = config_lib.default()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        config_lib.resolve(config)
    assert str(error.value).startswith(f"config.{key} is {value!r}")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("dataset", 3, "must be a text"),
        ("seed", "7", "must be a whole number"),
        ("seed", True, "must be a whole number"),
        ("data.max_length", 50.0, "must be a whole number"),
        ("data.buckets", "50", "must be whole numbers"),
        ("train.learning_rate", "fast", "must be a number"),
        ("train.epochs", None, "must be a whole number"),
        ("train.loss", ["bpr"], "must be a text"),
        ("model.hidden_size", "64", "must be a whole number"),
        ("model.is_time", "no", "must be True or False"),
        ("model.dropout_prob", "0.1", "must be a number"),
        ("model.name", 3, "must be a text"),
    ],
)
def test_values_of_another_kind(key, value, words):
    """Settings that do not come from `default` can have any type."""
    config = config_lib.default()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        config_lib.resolve(config)
    assert str(error.value).startswith(f"config.{key} is {value!r}")
    assert words in str(error.value)


def test_values_that_become_of_the_right_kind():
    config = config_lib.default()
    with config.ignore_type():
        config.train.learning_rate, config.model.norm_eps = 1, 1
        config.data.buckets = [25, 50]
    config = config_lib.resolve(config)
    assert repr((config.train.learning_rate, config.model.norm_eps)) == "(1.0, 1.0)"
    assert config.data.buckets == (25, 50)


def test_gbce_may_be_calibrated_in_full():
    """With 1 the scores are probabilities."""
    config = config_lib.default()
    config.train.update(loss="gbce", calibration=1.0)
    assert config_lib.resolve(config).train.calibration == 1.0


def test_settings_that_are_missing():
    config = config_lib.default()
    del config.train["epochs"]
    with pytest.raises(UserError, match=r"config.train.epochs is missing; begin with .*default"):
        config_lib.resolve(config)
    config = config_lib.default()
    del config["data"]
    with pytest.raises(UserError, match=r"config.data.max_length is missing"):
        config_lib.resolve(config)
    config = config_lib.default()
    del config.model["hidden_size"]  # the model knows it
    assert config_lib.resolve(config).model.hidden_size == 64


def test_packed_rows_have_exact_gaps():
    config = config_lib.default()
    config_lib.use_model(config, "tisasrec")
    assert config_lib.resolve(config).data.convention == "recbole"
    config.train.objective = "every_position"
    assert config_lib.resolve(config).data.convention == "exact"
    config.data.convention = "recbole"
    with pytest.raises(UserError, match="packed rows have exact gaps"):
        config_lib.resolve(config)


@pytest.mark.parametrize(
    ("model", "key", "value"),
    [("tim4rec", "train.loss", "os:path"), ("bert4rec", "train.objective", "cloze")],
)
def test_what_the_offset_of_items_seen_needs(model, key, value):
    config = config_lib.default()
    config_lib.use_model(config, model)
    config.model.repeat_bias = True
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"repeat_bias is True, which needs .*{value}"):
        config_lib.resolve(config)


@pytest.mark.parametrize(
    ("model", "knots", "problem"),
    [("tim4rec", 1, "must be 2 or more"), ("bert4rec", 8, "the objective is cloze")],
)
def test_what_drift_needs(model, knots, problem):
    config = config_lib.default()
    config_lib.use_model(config, model)
    config.model.date_bias_knots = knots
    with pytest.raises(UserError, match=f"date_bias_knots is {knots}.*{problem}"):
        config_lib.resolve(config)


@pytest.mark.parametrize(("encoding", "convention"), [("paper", "recbole"), ("masked", "exact")])
def test_the_convention_of_gaps_follows_the_encoding(encoding, convention):
    config = config_lib.default()
    config.model.time_encoding = encoding
    assert config_lib.resolve(config).data.convention == convention


def test_a_setting_there_is_not():
    config = config_lib.default()
    config.train.epoch = 3
    with pytest.raises(UserError, match=r"config.train.epoch is not a setting"):
        config_lib.resolve(config)
