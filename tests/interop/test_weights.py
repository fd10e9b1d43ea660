"""Torch names and layouts to ours and back; what is said when weights do not fit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from tests.interop.golden_models import NAMES, read_golden
from tim4rec_jax.errors import UserError
from tim4rec_jax.interop import from_torch, to_torch
from tim4rec_jax.layers.time import DateBias
from tim4rec_jax.models import build


@pytest.fixture(scope="module")
def golden():
    return read_golden("tiny_p2pT")


@pytest.mark.parametrize("name", NAMES)
def test_to_torch_undoes_from_torch(name):
    golden = read_golden(name)
    back = to_torch(golden.model())
    assert back.keys() == golden.state_dict.keys()
    for parameter, value in golden.state_dict.items():
        assert back[parameter].dtype == np.float32
        np.testing.assert_array_equal(back[parameter], value)


def test_float64_weights_make_a_float64_model(golden, x64):
    weights = {name: value / np.float64(3) for name, value in golden.state_dict.items()}
    back = to_torch(from_torch(weights, golden.config))
    for name, value in weights.items():
        assert back[name].dtype == np.float64
        np.testing.assert_array_equal(back[name], value)


def test_half_precision_weights_become_float32(golden):
    weights = {name: v.astype(ml_dtypes.bfloat16) for name, v in golden.state_dict.items()}
    back = to_torch(from_torch(weights, golden.config))
    for name, value in weights.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], value.astype(np.float32))


@pytest.mark.parametrize(
    "name, shown", [("popularity", "Popularity"), ("bsarec", "BSARec"), ("esasrec", "ESASRec")]
)
def test_a_model_without_torch_names_is_refused(name, shown):
    model = nnx.eval_shape(lambda: build({"name": name}, n_items=3, max_length=4))
    with pytest.raises(UserError, match=f"a model like {shown}: weights of BERT4Rec, .*Mamba4Rec"):
        to_torch(model)


def test_what_the_published_model_lacks_is_refused(golden):
    model = golden.model()
    model.drift = DateBias(2, 4, param_dtype=jnp.float32)
    with pytest.raises(UserError, match=r"train with config\.model\.date_bias_knots=0"):
        to_torch(model)
    model.drift = None
    model.offset = nnx.Param(jnp.zeros(()))
    with pytest.raises(UserError, match=r"train with config\.model\.repeat_bias=False"):
        to_torch(model)


def test_the_number_of_items_comes_from_the_embedding(golden):
    config = {key: value for key, value in golden.config.items() if key != "n_items"}
    assert from_torch(golden.state_dict, config).n_items == 39


def test_numbers_may_be_strings_and_other_keys_are_ignored(golden):
    # PyYAML reads the released files' 1e-12 as a string.
    config = golden.config | {"norm_eps": "1e-12", "train_batch_size": 2048, "learner": "adam"}
    assert from_torch(golden.state_dict, config).norm.epsilon == 1e-12


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


WEIGHT_FAULTS = {
    "missing": (lambda w: without(w, "in_layer_norm.bias"), "missing in_layer_norm.bias"),
    "extra": (lambda w: w | {"loss.weight": np.ones(3, "f4")}, "unexpected loss.weight"),
    "shape": (
        lambda w: w | {"layer_norm_time.bias": np.zeros(20, "f4")},
        r"layer_norm_time.bias has shape \(20,\), expected \(12,\)",
    ),
    "integers": (
        lambda w: w | {"layer_norm_time.bias": np.zeros(12, "i8")},
        "layer_norm_time.bias is int64: expected floating point",
    ),
    "other model": (lambda w: {"fc.weight": np.ones((2, 2), "f4")}, "not a TiM4Rec model"),
    "many": (lambda w: dict(list(w.items())[:5]), "missing .*, .*, .* and 57 more"),
}


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_do_not_fit(golden, fault):
    change, message = WEIGHT_FAULTS[fault]
    with pytest.raises(UserError, match=message):
        from_torch(change(golden.state_dict), golden.config)


CONFIG_FAULTS = {
    "missing": (lambda c: without(c, "d_state"), "lacks d_state"),
    "no number": (lambda c: c | {"hidden_size": "wide"}, "hidden_size is 'wide': expected int"),
    "no bool": (lambda c: c | {"is_time": "False"}, "is_time is 'False': expected bool"),
    "impossible": (lambda c: c | {"head_dim": 5}, "head_dim is 5; it must divide"),
    "time off": (lambda c: c | {"is_time": False}, "unexpected .*give the configuration"),
    "other length": (lambda c: c | {"MAX_ITEM_LIST_LENGTH": 50}, r"\(12,\), expected \(50,\)"),
    "other items": (lambda c: c | {"n_items": 99}, r"\(40, 16\), expected \(99, 16\)"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_configuration_that_does_not_fit(golden, fault):
    change, message = CONFIG_FAULTS[fault]
    with pytest.raises(UserError, match=message):
        from_torch(golden.state_dict, change(golden.config))


def test_float64_weights_need_64_bits(golden):
    weights = {name: value.astype(np.float64) for name, value in golden.state_dict.items()}
    with jax.enable_x64(False), pytest.raises(UserError, match="JAX_ENABLE_X64=1"):
        from_torch(weights, golden.config)
