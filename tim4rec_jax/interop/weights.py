"""Converts weights between the published PyTorch models and ours."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tim4rec_jax.errors import UserError
from tim4rec_jax.interop.formats import FORMATS, Format, read_setting, shown
from tim4rec_jax.models import MODELS, SequenceModel, build

_SMALL_MODEL = 1 << 24  # numbers
_USERS = "user_embedding.weight"


def model_format(config: Mapping) -> Format:
    """Returns the format of the model that a configuration names; without a name, TiM4Rec's.

    Raises:
      UserError: the model is not known.
    """
    name = config.get("model", "TiM4Rec")
    if not isinstance(name, str) or name not in FORMATS:
        raise UserError(
            f"the configuration's model is {shown(name)}: readable are {', '.join(sorted(FORMATS))}"
        )
    return FORMATS[name]


def model_config(config: Mapping) -> tuple[dict, int]:
    """Returns our settings and the longest history for the configuration of a published model.

    Raises:
      UserError: the model is not known, or a key is missing or has a value of the wrong type.
    """
    form = model_format(config)
    settings, max_length = form.read_settings(config)
    known = {field.name for field in dataclasses.fields(MODELS[form.model].Settings)}
    # The reference has no such key: its activation depends on what is installed.
    if "conv_path" in config and "conv_path" in known:
        if not isinstance(config["conv_path"], str):
            raise UserError(
                f"the configuration's conv_path is {shown(config['conv_path'])}: expected str"
            )
        settings["conv_path"] = config["conv_path"]
    return settings, max_length


def _format_of(model: SequenceModel) -> Format:
    for form in FORMATS.values():
        if MODELS[form.model] is type(model):
            return form
    raise UserError(
        f"there are no PyTorch names for a model like {type(model).__name__}: weights of "
        f"{', '.join(sorted(FORMATS))} can be converted"
    )


def _parameters(model: SequenceModel) -> list[tuple[tuple, nnx.Param]]:
    return list(nnx.to_flat_state(nnx.state(model, nnx.Param)))


def parameter_names(model: SequenceModel) -> dict[str, str]:
    """Returns our name for each torch name, for example `blocks.0.ssd.in_proj.kernel`."""
    name = _format_of(model).torch_name
    return {name(path): ".".join(map(str, path)) for path, _ in _parameters(model)}


def _param_dtype(state_dict: Mapping[str, np.ndarray]) -> type:
    for name, value in state_dict.items():
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            raise UserError(f"parameter {name} is {value.dtype}: expected floating point")
    if not any(value.dtype in (np.float64, np.complex128) for value in state_dict.values()):
        return jnp.float32
    if jnp.result_type(float) != np.float64:
        raise UserError(
            "the weights are float64, which JAX would cut to float32: set JAX_ENABLE_X64=1, or "
            "convert the weights"
        )
    return jnp.float64


def _check(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    def some(names):
        names = sorted(names)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing {some(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"unexpected {some(extra)}")
    for name in sorted(expected.keys() & found.keys()):
        if found[name].shape != expected[name].shape:
            problems.append(
                f"{name} has shape {found[name].shape}, expected {expected[name].shape}"
            )
            break
    for name in sorted(expected.keys() & found.keys()):
        if not np.isfinite(found[name]).all():
            raise UserError(f"parameter {name} holds values that are not finite: train it again")
    if problems:
        raise UserError(
            f"the weights do not fit the configuration: {'; '.join(problems)}: give the "
            "configuration the model was trained with (--config FILE.yaml)"
        )


def from_torch(state_dict: Mapping[str, np.ndarray], config: Mapping) -> SequenceModel:
    """Builds one of our models with the weights of a published model.

    Args:
      state_dict: the array of each torch name. The model is float64 if an array is float64, and
        float32 otherwise.
      config: the keys of the published configuration, as its YAML files or RecBole's
        `final_config_dict` have them. Other keys are ignored. `model` names the model; the default
        is TiM4Rec. `n_items` and `n_users` include the padding; by default they come from the
        tables.

    Returns:
      The model, ready for evaluation and training. TiM4Rec has the time encoding `paper`.

    Raises:
      UserError: a setting or parameter is missing, unknown or of the wrong shape, or the
        weights are float64 and JAX is not set to 64 bits.
    """
    form = model_format(config)
    settings, max_length = model_config(config)
    table = "item_embedding.weight"
    if table not in state_dict:
        name = config.get("model", "TiM4Rec")
        raise UserError(f"the weights hold no {table}: not a {name} model")
    # The rows of a table of each kind, where the configuration does not say it.
    rows = {name: (np.shape(state_dict.get(name, 0)) or (1,))[0] for name in (table, _USERS)}
    sizes = {"n_items": rows[table] - MODELS[form.model].special_rows + 1, "n_users": rows[_USERS]}
    for key in sizes:
        if key in config:
            sizes[key] = read_setting(config, key, int)
        if sizes[key] < 1:
            raise UserError(f"{key} is {sizes[key]}, the padding included: expected 1 or more")
    try:
        # Shapes alone: nothing is drawn only to be replaced.
        shapes = nnx.eval_shape(
            lambda: build(
                settings,
                n_items=sizes["n_items"] - 1,
                n_users=sizes["n_users"] - 1,
                max_length=max_length,
                param_dtype=_param_dtype(state_dict),
            )
        )
    except ValueError as error:
        raise UserError(f"the configuration does not make a model: {error}") from None
    graph, params = nnx.split(shapes)
    # Before memory is taken for it, a model must be about as large as the weights.
    held = sum(2 * value.size for value in state_dict.values())  # a complex number is two here
    asked = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    if asked > 2 * held + _SMALL_MODEL:
        raise UserError(
            f"the configuration makes a model of {asked:,} numbers, and the weights hold "
            f"{held // 2:,}: give the configuration the model was trained with (--config FILE.yaml)"
        )
    zeros = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), params)
    model: SequenceModel = nnx.merge(graph, zeros)
    _check(state_dict, to_torch(model))
    for path, param in _parameters(model):
        value = form.layout(path).from_torch(np.asarray(state_dict[form.torch_name(path)]))
        param[...] = jnp.asarray(value, param.dtype)
    return model


def to_torch(model: SequenceModel) -> dict[str, np.ndarray]:
    """Returns every parameter under its torch name and in the layout of torch.

    This is the inverse of `from_torch`.

    Raises:
      UserError: the model has a parameter that the published one lacks.
    """
    if model.offset is not None:
        raise UserError(
            "the published models have no repeat bias: train with config.model.repeat_bias=False"
        )
    if model.drift is not None:
        raise UserError(
            "the published models have no date bias: train with config.model.date_bias_knots=0"
        )
    if model.feature_maps is not None:
        raise UserError(
            "the published models have no item features: load the run with "
            "tim4rec_jax.run.load_model, which writes what they add into the item table"
        )
    form = _format_of(model)
    return {
        form.torch_name(path): form.layout(path).to_torch(np.asarray(param[...]))
        for path, param in _parameters(model)
    }
