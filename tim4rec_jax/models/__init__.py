"""Models, one file each; `tim4rec_jax.models.base` says what they have in common."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tim4rec_jax.config import Config
from tim4rec_jax.models.base import SequenceModel, condition_on_time, encode_batch, inputs
from tim4rec_jax.models.bert4rec import BERT4Rec
from tim4rec_jax.models.caser import Caser
from tim4rec_jax.models.causal_tim4rec import CausalTiM4Rec
from tim4rec_jax.models.gru4rec import GRU4Rec
from tim4rec_jax.models.hstu import HSTU
from tim4rec_jax.models.lrurec import LRURec
from tim4rec_jax.models.mamba4rec import Mamba4Rec
from tim4rec_jax.models.popularity import Popularity
from tim4rec_jax.models.sasrec import SASRec
from tim4rec_jax.models.ssd4rec import SSD4Rec
from tim4rec_jax.models.tim4rec import TiM4Rec
from tim4rec_jax.models.tisasrec import TiSASRec

MODELS: dict[str, type[SequenceModel]] = {
    "tim4rec": TiM4Rec,  # CausalTiM4Rec with `time_encoding="causal"`
    "gru4rec": GRU4Rec,
    "popularity": Popularity,
    "caser": Caser,
    "lrurec": LRURec,
    "mamba4rec": Mamba4Rec,
    "ssd4rec": SSD4Rec,
    "sasrec": SASRec,
    "bert4rec": BERT4Rec,
    "tisasrec": TiSASRec,
    "hstu": HSTU,
}


def model_class(config: Config) -> type[SequenceModel]:
    """The model that `config["name"]` names.

    Raises:
      ValueError: the name is not known.
    """
    if config["name"] not in MODELS:
        raise ValueError(f"model {config['name']!r} is not one of {sorted(MODELS)}")
    model = MODELS[config["name"]]
    return CausalTiM4Rec if model is TiM4Rec and config["time_encoding"] == "causal" else model


def build(
    config: Config,
    *,
    n_items: int,
    max_length: int,
    n_users: int = 0,
    item_counts: np.ndarray | None = None,
    seed: int = 0,
    param_dtype=jnp.float32,
) -> SequenceModel:
    """Builds the model that `config["name"]` names.

    Args:
      config: the model's settings (`config.model` of a run).
      n_items: number of items, without padding.
      max_length: longest history.
      n_users: number of users, for models that know them.
      item_counts: int [n_items], events of each item in training, for `popularity`.
      seed: of the initial weights.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: the name or a setting is not known.
    """
    model: Any = model_class(config)
    sizes: dict = {"n_items": n_items, "max_length": max_length}
    if model.by_user:
        sizes["n_users"] = n_users
    if config["name"] == "popularity":
        sizes["item_counts"] = item_counts
    return model(config, **sizes, rngs=nnx.Rngs(params=seed), param_dtype=param_dtype)


__all__ = [
    "MODELS",
    "CausalTiM4Rec",
    "SequenceModel",
    "TiM4Rec",
    "build",
    "condition_on_time",
    "encode_batch",
    "inputs",
    "model_class",
]
