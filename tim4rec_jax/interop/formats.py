"""How published models name their settings and weights, and how they lay them out in memory."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tim4rec_jax.errors import UserError, one_line

Path = tuple[Any, ...]  # the place of a parameter in our model: ("blocks", 0, "norm", "scale")

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


class Layout(NamedTuple):
    """Two functions that convert an array, each the inverse of the other."""

    to_torch: Callable[[np.ndarray], np.ndarray]
    from_torch: Callable[[np.ndarray], np.ndarray]


AS_IT_IS = Layout(lambda value: value, lambda value: value)
TRANSPOSED = Layout(np.transpose, np.transpose)  # linear: [in, out] <-> [out, in]
# Depthwise convolution: [width, C] <-> [C, 1, width].
DEPTHWISE = Layout(lambda value: value.T[:, None], lambda value: value[:, 0].T)


@dataclass(frozen=True)
class Format:
    """The names and layouts of one published model.

    Attributes:
      model: the name of our model (`tim4rec_jax.models.MODELS`).
      settings: the keys that its configuration must have, with their types. Our settings have the
        same names.
      modules: the published name of each of our modules, with `*` for the number of a layer. In a
        parameter, our last name `kernel`, `scale` or `embedding` becomes `weight`. A parameter
        that differs in another way is listed with its whole name.
      layouts: the layout of a parameter, by its whole name. By default a kernel is transposed, and
        other parameters are as in torch.
      fixed: settings of ours that the published configuration does not have.
    """

    model: str
    settings: Mapping[str, type]
    modules: Mapping[str, str]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def torch_name(self, path: Path) -> str:
        """Returns the torch name of our parameter."""
        pattern = _pattern(path)
        module, _, leaf = pattern.rpartition(".")
        if pattern in self.modules:
            name = self.modules[pattern]
        else:
            prefix = f"{self.modules[module]}." if module else ""
            name = prefix + _LEAVES.get(leaf, leaf)
        for number in (part for part in path if isinstance(part, int)):
            name = name.replace("*", str(number), 1)
        return name

    def layout(self, path: Path) -> Layout:
        """Returns the layout of our parameter."""
        return self.layouts.get(_pattern(path), TRANSPOSED if path[-1] == "kernel" else AS_IT_IS)

    def read_settings(self, config: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Returns our settings and the longest history for a published configuration.

        Raises:
          UserError: a key is missing or has a value of the wrong type.
        """
        kinds = {**self.settings, "MAX_ITEM_LIST_LENGTH": int}
        if missing := [key for key in kinds if key not in config]:
            raise UserError(
                f"the configuration lacks {', '.join(missing)}: give the YAML file the model was "
                "trained with (--config FILE.yaml)"
            )
        settings = {key: read_setting(config, key, kind) for key, kind in kinds.items()}
        max_length = settings.pop("MAX_ITEM_LIST_LENGTH")
        return {"name": self.model, "dtype": "float32", **self.fixed, **settings}, max_length


def _pattern(path: Path) -> str:
    return ".".join("*" if isinstance(part, int) else part for part in path)


def read_setting(config: Mapping[str, Any], key: str, kind: type) -> Any:
    """Returns the value of a key as a `bool`, an `int` or a `float`.

    Raises:
      UserError: the value is of another type, not finite, or would be rounded.
    """
    value = config[key]
    try:
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float | str):
            raise ValueError
        read = kind(value)  # PyYAML reads 1e-12 as a string
        if not math.isfinite(read) or (isinstance(value, float) and read != value):
            raise ValueError
        return read
    except (OverflowError, ValueError):
        raise UserError(
            f"the configuration's {key} is {shown(value)}: expected {kind.__name__}"
        ) from None


def shown(value: Any) -> str:
    """A value for an error message; YAML can make lists that are too large to print."""
    simple = isinstance(value, int | float | str | None)
    return one_line(repr(value), 60) if simple else f"a {type(value).__name__}"


# TiM4Rec, as its authors published it.

SSD_LAYER = {
    "blocks.*.ssd": "ssd_layers.*.ssd",
    "blocks.*.ssd.in_proj": "ssd_layers.*.ssd.in_proj",
    "blocks.*.ssd.conv": "ssd_layers.*.ssd.conv1d",
    "blocks.*.ssd.norm": "ssd_layers.*.ssd.norm",
    "blocks.*.ssd.out_proj": "ssd_layers.*.ssd.out_proj",
    "blocks.*.norm": "ssd_layers.*.layer_norm",
    "blocks.*.feed_forward.fc1": "ssd_layers.*.ffn.fc1",
    "blocks.*.feed_forward.fc2": "ssd_layers.*.ffn.fc2",
    "blocks.*.feed_forward.norm": "ssd_layers.*.ffn.layer_norm",
}

SSD_SETTINGS = {
    "hidden_size": int,
    "num_layers": int,
    "dropout_prob": float,
    "d_state": int,
    "d_conv": int,
    "expand": int,
    "head_dim": int,
    "chunk_size": int,
    "norm_eps": float,
    "is_ffn": bool,
    "is_kai_ming_init": bool,
}

TIM4REC = Format(
    model="tim4rec",
    settings={**SSD_SETTINGS, "time_drop_out": float, "is_time": bool, "p2p_residual": bool},
    modules={
        "item_embedding": "item_embedding",
        "norm": "in_layer_norm",
        "time.norm": "layer_norm_time",
        **SSD_LAYER,
        "blocks.*.mixer.scale_in": "ssd_layers.*.ssd.mlp4time_scale.1",
        "blocks.*.mixer.scale_out": "ssd_layers.*.ssd.mlp4time_scale.3",
        "blocks.*.mixer.conv_1": "ssd_layers.*.ssd.conv1d4time_1",
        "blocks.*.mixer.conv_2": "ssd_layers.*.ssd.conv1d4time_2",
        "blocks.*.mixer.gate": "ssd_layers.*.ssd.time_gate_residual.1",
        "blocks.*.mixer.norm": "ssd_layers.*.ssd.time_layer_norm",
    },
    layouts={
        "blocks.*.ssd.conv.kernel": DEPTHWISE,
        "blocks.*.mixer.conv_1.kernel": DEPTHWISE,
        "blocks.*.mixer.conv_2.kernel": DEPTHWISE,
    },
    fixed={"time_encoding": "paper"},
)


# SSD4Rec*, as the authors of TiM4Rec published it.

SSD4REC = Format(
    model="ssd4rec",
    settings=SSD_SETTINGS,
    modules={"item_embedding": "item_embedding", "norm": "in_layer_norm", **SSD_LAYER},
    layouts={"blocks.*.ssd.conv.kernel": DEPTHWISE},
)


# Mamba4Rec, as its authors published it.

MAMBA4REC = Format(
    model="mamba4rec",
    settings={
        "hidden_size": int,
        "num_layers": int,
        "dropout_prob": float,
        "d_state": int,
        "d_conv": int,
        "expand": int,
    },
    modules={
        "item_embedding": "item_embedding",
        "norm": "LayerNorm",
        "blocks.*.mamba": "mamba_layers.*.mamba",
        "blocks.*.mamba.in_proj": "mamba_layers.*.mamba.in_proj",
        "blocks.*.mamba.conv": "mamba_layers.*.mamba.conv1d",
        "blocks.*.mamba.x_proj": "mamba_layers.*.mamba.x_proj",
        "blocks.*.mamba.dt_proj": "mamba_layers.*.mamba.dt_proj",
        "blocks.*.mamba.out_proj": "mamba_layers.*.mamba.out_proj",
        "blocks.*.norm": "mamba_layers.*.LayerNorm",
        "blocks.*.feed_forward.fc1": "mamba_layers.*.ffn.w_1",
        "blocks.*.feed_forward.fc2": "mamba_layers.*.ffn.w_2",
        "blocks.*.feed_forward.norm": "mamba_layers.*.ffn.LayerNorm",
    },
    layouts={"blocks.*.mamba.conv.kernel": DEPTHWISE},
)


# LRURec, as the authors of TiM4Rec published it. Its complex arrays are pairs of real arrays here.


def _complex(pair: np.ndarray) -> np.ndarray:
    return pair[0] + 1j * pair[1]


def _pair(value: np.ndarray) -> np.ndarray:
    return np.stack([np.real(value), np.imag(value)])


_BIAS = Layout(_complex, _pair)
_KERNEL = Layout(lambda pair: _complex(pair).T, lambda value: _pair(value.T))
_LRU = "encoder.lru_blocks.*.lru_layer"
_NETWORK = "encoder.lru_blocks.*.feed_forward"

LRUREC = Format(
    model="lrurec",
    settings={"hidden_size": int, "n_layers": int, "dropout_prob": float},
    modules={
        "item_embedding": "item_embedding",
        "norm": "layer_norm",
        "score_bias": "bias",
        "blocks.*.lru": _LRU,
        "blocks.*.lru.in_kernel": f"{_LRU}.in_proj.weight",
        "blocks.*.lru.in_bias": f"{_LRU}.in_proj.bias",
        "blocks.*.lru.out_kernel": f"{_LRU}.out_proj.weight",
        "blocks.*.lru.out_bias": f"{_LRU}.out_proj.bias",
        "blocks.*.norm": f"{_LRU}.layer_norm",
        "blocks.*.feed_forward.fc1": f"{_NETWORK}.w_1",
        "blocks.*.feed_forward.fc2": f"{_NETWORK}.w_2",
        "blocks.*.feed_forward.norm": f"{_NETWORK}.layer_norm",
    },
    layouts={
        "blocks.*.lru.in_kernel": _KERNEL,
        "blocks.*.lru.in_bias": _BIAS,
        "blocks.*.lru.out_kernel": _KERNEL,
        "blocks.*.lru.out_bias": _BIAS,
    },
)


# GRU4Rec, as RecBole publishes it.

GRU4REC = Format(
    model="gru4rec",
    settings={"embedding_size": int, "hidden_size": int, "num_layers": int, "dropout_prob": float},
    modules={
        "item_embedding": "item_embedding",
        "blocks.*.input": "gru_layers.weight_ih_l*",
        "blocks.*.recurrent": "gru_layers.weight_hh_l*",
        "dense": "dense",
    },
    layouts={"blocks.*.input": TRANSPOSED, "blocks.*.recurrent": TRANSPOSED},
)


# Caser, as RecBole publishes it.

CASER = Format(
    model="caser",
    settings={
        "embedding_size": int,
        "nv": int,
        "nh": int,
        "dropout_prob": float,
        "reg_weight": float,
    },
    modules={
        "user_embedding": "user_embedding",
        "item_embedding": "item_embedding",
        "vertical": "conv_v",
        "windows.*": "conv_h.*",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    layouts={
        # Images of one channel: [L, nv] <-> [nv, 1, L, 1], [height, D, nh] <-> [nh, 1, height, D].
        "vertical.kernel": Layout(
            lambda value: value.T[:, None, :, None], lambda value: value[:, 0, :, 0].T
        ),
        "windows.*.kernel": Layout(
            lambda value: value.transpose(2, 0, 1)[:, None],
            lambda value: value[:, 0].transpose(1, 2, 0),
        ),
    },
)


# SASRec, BERT4Rec and TiSASRec, which are made of the transformer layers of RecBole.

_SETTINGS = {
    "hidden_size": int,
    "inner_size": int,
    "n_layers": int,
    "n_heads": int,
    "hidden_dropout_prob": float,
    "attn_dropout_prob": float,
    "layer_norm_eps": float,
}

_THEIRS = "trm_encoder.layer.*"
_MODULES = {
    "item_embedding": "item_embedding",
    "positions.embedding": "position_embedding",
    "positions.norm": "LayerNorm",
    "layers.*.attention.query": f"{_THEIRS}.multi_head_attention.query",
    "layers.*.attention.key": f"{_THEIRS}.multi_head_attention.key",
    "layers.*.attention.value": f"{_THEIRS}.multi_head_attention.value",
    "layers.*.attention.out": f"{_THEIRS}.multi_head_attention.dense",
    "layers.*.norm": f"{_THEIRS}.multi_head_attention.LayerNorm",
    "layers.*.fc1": f"{_THEIRS}.feed_forward.dense_1",
    "layers.*.fc2": f"{_THEIRS}.feed_forward.dense_2",
    "layers.*.out_norm": f"{_THEIRS}.feed_forward.LayerNorm",
}

SASREC = Format(model="sasrec", settings=_SETTINGS, modules=_MODULES)

BERT4REC = Format(
    model="bert4rec",
    settings={**_SETTINGS, "mask_ratio": float},
    modules={**_MODULES, "head": "output_ffn", "head_norm": "output_ln"},
    fixed={"ft_ratio": 0.5},
)

TISASREC = Format(
    model="tisasrec",
    settings={**_SETTINGS, "time_span": int},
    modules={
        **_MODULES,
        "time_keys": "time_matrix_K_emb",
        "time_values": "time_matrix_V_emb",
    },
)


# The published models whose weights can be read, by the name in their configuration.

FORMATS: dict[str, Format] = {
    "TiM4Rec": TIM4REC,
    "GRU4Rec": GRU4REC,
    "Caser": CASER,
    "LRURec": LRUREC,
    "Mamba4Rec": MAMBA4REC,
    "SSD4Rec_r": SSD4REC,
    "SASRec": SASREC,
    "BERT4Rec": BERT4REC,
    "TiSASRec": TISASREC,
}

__all__ = ["FORMATS", "Format"]
