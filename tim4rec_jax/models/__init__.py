"""Models, one file each, all with the same small protocol.

`model(items, lengths, gaps) -> hidden [B,L,D]`, `model.encode(...) -> [B,D]` and
`model.item_embedding`, whose rows score the items. Models whose `causal` is true also take
`segment_ids`, and go on event by event with `init_state` and `step`.
"""

import jax.numpy as jnp
from flax import nnx

from tim4rec_jax.config import Config
from tim4rec_jax.models.causal_tim4rec import CausalTiM4Rec
from tim4rec_jax.models.tim4rec import TiM4Rec

MODELS = {"tim4rec": TiM4Rec}  # CausalTiM4Rec with `time_encoding="causal"`


def build(
    config: Config,
    *,
    n_items: int,
    max_length: int,
    seed: int = 0,
    param_dtype=jnp.float32,
) -> nnx.Module:
    """Builds the model that `config["name"]` names.

    Args:
      config: the model's settings (`config.model` of a run).
      n_items: number of items, without padding.
      max_length: longest history.
      seed: of the initial weights.
      param_dtype: dtype of the parameters.

    Raises:
      ValueError: the name or a setting is not known.
    """
    if config["name"] not in MODELS:
        raise ValueError(f"model {config['name']!r} is not one of {sorted(MODELS)}")
    model = MODELS[config["name"]]
    if model is TiM4Rec and config["time_encoding"] == "causal":
        model = CausalTiM4Rec
    return model(
        config,
        n_items=n_items,
        max_length=max_length,
        rngs=nnx.Rngs(params=seed),
        param_dtype=param_dtype,
    )


__all__ = ["MODELS", "CausalTiM4Rec", "TiM4Rec", "build"]
