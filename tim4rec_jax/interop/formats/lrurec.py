"""LRURec as the authors of TiM4Rec published it; complex there, pairs of real arrays here."""

import numpy as np

from tim4rec_jax.interop.formats.format import Format, Layout


def _complex(pair: np.ndarray) -> np.ndarray:
    return pair[0] + 1j * pair[1]


def _pair(value: np.ndarray) -> np.ndarray:
    return np.stack([np.real(value), np.imag(value)])


_BIAS = Layout(_complex, _pair)
_KERNEL = Layout(lambda pair: _complex(pair).T, lambda value: _pair(value.T))
_LRU = "encoder.lru_blocks.*.lru_layer"
_NETWORK = "encoder.lru_blocks.*.feed_forward"

FORMAT = Format(
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
