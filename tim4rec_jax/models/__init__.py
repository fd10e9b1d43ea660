"""Models, one file each. A new model is one file and one line in `MODELS`."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from tim4rec_jax.checks import checked
from tim4rec_jax.errors import first_line
from tim4rec_jax.layers.items import FeatureArrays
from tim4rec_jax.models.base import (
    DataSizes,
    ModelSettings,
    SequenceModel,
    condition_on_time,
    encode_batch,
    inputs,
)
from tim4rec_jax.models.bert4rec import BERT4Rec
from tim4rec_jax.models.bsarec import BSARec
from tim4rec_jax.models.caser import Caser
from tim4rec_jax.models.esasrec import ESASRec
from tim4rec_jax.models.gru4rec import GRU4Rec
from tim4rec_jax.models.hstu import HSTU
from tim4rec_jax.models.lrurec import LRURec
from tim4rec_jax.models.mamba4rec import Mamba4Rec
from tim4rec_jax.models.popularity import Popularity
from tim4rec_jax.models.sasrec import SASRec
from tim4rec_jax.models.ssd4rec import SSD4Rec
from tim4rec_jax.models.tim4rec import CausalTiM4Rec, TiM4Rec
from tim4rec_jax.models.tisasrec import TiSASRec

MODELS: dict[str, type[SequenceModel]] = {
    "tim4rec": TiM4Rec,
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
    "bsarec": BSARec,
    "esasrec": ESASRec,
}
DEFAULT_MODEL = "tim4rec"


def find_model(name: str) -> type[SequenceModel]:
    """The model of this name.

    Args:
      name: a key of `MODELS`, or "module:Class" for a model outside this package. The module is
        imported, so that a run of such a model can be loaded without any other preparation.

    Raises:
      ValueError: there is no such model.
    """
    if name in MODELS:
        return MODELS[name]
    if ":" not in name:
        raise ValueError(
            f"name is {name!r}; it must be one of {', '.join(MODELS)}, or name a model of your own "
            "as 'module:Class'"
        )
    try:
        found = imported(name)
    except ValueError as error:
        raise ValueError(f"name {error}") from error
    if not (isinstance(found, type) and issubclass(found, SequenceModel)):
        raise ValueError(f"name is {name!r}, which is no subclass of SequenceModel")
    return found


def imported(name: str) -> Any:
    """What a setting names as "module:Class" or "module:function".

    The module is looked for where Python looks for modules, and then in the current folder.

    Raises:
      ValueError: it cannot be imported. The message can follow the name of the setting.
    """
    module, _, attribute = name.partition(":")
    here = os.getcwd()
    try:
        if here not in sys.path:  # as `python -m` has it, but not a script in another folder
            sys.path.append(here)
        return getattr(importlib.import_module(module), attribute)
    # The module belongs to the user, who can correct whatever it raises.
    except Exception as error:
        raise ValueError(
            f"is {name!r}, which cannot be imported ({type(error).__name__}: {first_line(error)}); "
            f"start the command in the folder that holds the module {module}, or put that folder "
            "on PYTHONPATH"
        ) from error


def model_settings(config: Mapping[str, Any] | ConfigDict) -> ModelSettings:
    """The settings of a model as its own dataclass.

    Args:
      config: `name`, and the settings that differ from the model's defaults (`config.model` of a
        run holds all).

    Raises:
      ValueError: the name or a setting is not known, or a setting is out of its range.
    """
    settings = dict(config)
    kind = find_model(settings.pop("name")).Settings
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(settings.keys() - fields.keys()):
        raise ValueError(
            f"{unknown[0]} is no setting of {config['name']}; it has {', '.join(fields)}"
        )
    for key, value in settings.items():
        try:
            settings[key] = checked(value, type(fields[key].default))
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
    return kind(**settings)


def configure(
    config: Mapping[str, Any] | ConfigDict,
) -> tuple[type[SequenceModel], ModelSettings]:
    """The class that `build` makes from these settings, and the settings as its dataclass.

    Arguments and errors are those of `model_settings`.
    """
    settings = model_settings(config)
    return find_model(str(config["name"])).variant(settings), settings


def model_class(config: Mapping[str, Any] | ConfigDict) -> type[SequenceModel]:
    """The class that `build` makes from these settings; arguments and errors as there."""
    return configure(config)[0]


def build(
    config: Mapping[str, Any] | ConfigDict,
    *,
    n_items: int,
    max_length: int,
    n_users: int = 0,
    item_counts: np.ndarray | None = None,
    item_features: FeatureArrays | None = None,
    neighbours: tuple[np.ndarray, np.ndarray] | None = None,
    date_range: tuple[int, int] | None = None,
    seed: int = 0,
    param_dtype: Any = jnp.float32,
) -> SequenceModel:
    """Builds a model with its initial weights.

    Args:
      config: as `model_settings`.
      n_items: number of items, without padding.
      max_length: length of the longest history, in events.
      n_users: number of users, for models that have a vector for each.
      item_counts: int [n_items], training events of each item, for `popularity`.
      item_features: of the items, for models with the setting of this name.
      neighbours: what `tim4rec_jax.data.item_neighbours` returns, for models with the setting of
        this name.
      date_range: times of the first and the last training event, in seconds since 1970, for models
        with `date_bias_knots`. Such a model cannot score anything without it.
      seed: of the initial weights.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: the name or a setting is not known, or a setting is out of its range.
    """
    sizes = DataSizes(n_items, max_length, n_users, item_counts, item_features, neighbours)
    rngs = nnx.Rngs(params=seed)
    make: Any
    make, settings = configure(config)
    model = make(settings, sizes, rngs=rngs, param_dtype=param_dtype)
    if model.drift is not None and date_range is not None:
        model.drift.spread_over(*date_range)
    return model


__all__ = [
    "DEFAULT_MODEL",
    "MODELS",
    "CausalTiM4Rec",
    "DataSizes",
    "FeatureArrays",
    "ModelSettings",
    "SequenceModel",
    "TiM4Rec",
    "build",
    "condition_on_time",
    "configure",
    "encode_batch",
    "find_model",
    "imported",
    "inputs",
    "model_class",
    "model_settings",
]
