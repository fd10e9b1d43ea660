"""Weights of the published PyTorch code <-> our TiM4Rec."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tim4rec_jax.errors import UserError
from tim4rec_jax.models import TiM4Rec

# What the reference's configuration must say; the names are its own.
_SETTINGS = {
    "hidden_size": int,
    "num_layers": int,
    "dropout_prob": float,
    "time_drop_out": float,
    "d_state": int,
    "d_conv": int,
    "expand": int,
    "head_dim": int,
    "chunk_size": int,
    "norm_eps": float,
    "is_ffn": bool,
    "is_time": bool,
    "p2p_residual": bool,
    "is_kai_ming_init": bool,
    "MAX_ITEM_LIST_LENGTH": int,
}

# Our module -> the reference's, outside and inside of a layer.
_MODULES = {
    "item_embedding": "item_embedding",
    "norm": "in_layer_norm",
    "time.norm": "layer_norm_time",
}
_LAYER_MODULES = {
    "ssd": "ssd",
    "ssd.in_proj": "ssd.in_proj",
    "ssd.conv": "ssd.conv1d",
    "ssd.norm": "ssd.norm",
    "ssd.out_proj": "ssd.out_proj",
    "mixer.scale_in": "ssd.mlp4time_scale.1",
    "mixer.scale_out": "ssd.mlp4time_scale.3",
    "mixer.conv_1": "ssd.conv1d4time_1",
    "mixer.conv_2": "ssd.conv1d4time_2",
    "mixer.gate": "ssd.time_gate_residual.1",
    "mixer.norm": "ssd.time_layer_norm",
    "norm": "layer_norm",
    "feed_forward.fc1": "ffn.fc1",
    "feed_forward.fc2": "ffn.fc2",
    "feed_forward.norm": "ffn.layer_norm",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def _torch_name(path: tuple) -> str:
    *module, leaf = path
    prefix, names = "", _MODULES
    if module[0] == "blocks":
        prefix, names, module = f"ssd_layers.{module[1]}.", _LAYER_MODULES, module[2:]
    return f"{prefix}{names['.'.join(module)]}.{_LEAVES.get(leaf, leaf)}"


def _is_conv(path: tuple) -> bool:
    return path[-2].startswith("conv")


def _to_torch_layout(path: tuple, value: np.ndarray) -> np.ndarray:
    """Linear [in, out] -> [out, in]; depthwise convolution [width, C] -> [C, 1, width]."""
    if path[-1] != "kernel":
        return value
    return value.T[:, None] if _is_conv(path) else value.T


def _from_torch_layout(path: tuple, value: np.ndarray) -> np.ndarray:
    if path[-1] != "kernel":
        return value
    return value[:, 0].T if _is_conv(path) else value.T


def _settings(config: Mapping) -> dict:
    if missing := [key for key in _SETTINGS if key not in config]:
        raise UserError(
            f"the configuration lacks {', '.join(missing)}: give the YAML file the model was "
            "trained with (--config FILE.yaml)"
        )

    def read(key, kind):
        try:
            if isinstance(config[key], bool) != (kind is bool):
                raise ValueError
            return kind(config[key])  # PyYAML reads 1e-12 as a string
        except (TypeError, ValueError):
            raise UserError(
                f"the configuration's {key} is {config[key]!r}: expected {kind.__name__}"
            ) from None

    return {key: read(key, kind) for key, kind in _SETTINGS.items()}


def model_config(config: Mapping) -> tuple[dict, int]:
    """Our model settings and L from the reference's configuration.

    Raises:
      UserError: a key is missing or has a value of the wrong type.
    """
    settings = _settings(config)
    max_length = settings.pop("MAX_ITEM_LIST_LENGTH")
    settings |= {"name": "tim4rec", "time_encoding": "paper", "dtype": "float32"}
    if "conv_path" in config:  # no key of the reference: it goes by what is installed
        settings["conv_path"] = config["conv_path"]
    return settings, max_length


def parameter_names(model: TiM4Rec) -> dict[str, str]:
    """The torch name of each parameter -> ours, for example `blocks.0.ssd.in_proj.kernel`."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {_torch_name(path): ".".join(map(str, path)) for path, _ in flat}


def _param_dtype(state_dict: Mapping[str, np.ndarray]) -> type:
    for name, value in state_dict.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(f"parameter {name} is {value.dtype}: expected floating point")
    if not any(value.dtype == np.float64 for value in state_dict.values()):
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
    if problems:
        raise UserError(
            f"the weights do not fit the configuration: {'; '.join(problems)}: give the "
            "configuration the model was trained with (--config FILE.yaml)"
        )


def from_torch(state_dict: Mapping[str, np.ndarray], config: Mapping) -> TiM4Rec:
    """Builds our TiM4Rec with the weights of the published PyTorch code.

    Args:
      state_dict: torch names to arrays. Any float64 array makes a float64 model, anything
        else a float32 one.
      config: the reference's own keys (its YAML files, RecBole's `final_config_dict`), others
        ignored. `n_items`, padding included, is taken from the embedding where absent.

    Returns:
      The model in time encoding `paper`, evaluation and training alike.

    Raises:
      UserError: a setting or parameter is missing, unknown or of the wrong shape, or the
        weights are float64 and JAX is not set to 64 bits.
    """
    settings, max_length = model_config(config)
    if "item_embedding.weight" not in state_dict:
        raise UserError("the weights hold no item_embedding.weight: not a TiM4Rec model")
    rows = config.get("n_items", len(state_dict["item_embedding.weight"]))
    try:
        model = TiM4Rec(
            settings,
            n_items=rows - 1,
            max_length=max_length,
            rngs=nnx.Rngs(params=0),
            param_dtype=_param_dtype(state_dict),
        )
    except ValueError as error:
        raise UserError(f"the configuration does not make a model: {error}") from None
    _check(state_dict, to_torch(model))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = _from_torch_layout(path, state_dict[_torch_name(path)])
        param[...] = jnp.asarray(value, param.dtype)
    return model


def to_torch(model: TiM4Rec) -> dict[str, np.ndarray]:
    """Every parameter under its torch name and in torch's layout; undoes `from_torch`."""
    return {
        _torch_name(path): _to_torch_layout(path, np.asarray(param[...]))
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
