"""SSD4Rec*: TiM4Rec without time, which its authors called SSD4Rec in their comparison."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tim4rec_jax.models.base import DataSizes, ModelSettings, count, not_negative, one_of, rate
from tim4rec_jax.models.tim4rec import CausalTiM4Rec, TiM4RecSettings


@dataclasses.dataclass(frozen=True)
class SSD4RecSettings(ModelSettings):
    """Names and defaults are those of the TiM4Rec repository.

    Attributes:
      hidden_size: D, the width of the item vectors.
      num_layers: number of layers.
      single_layer_residual: whether a single layer has a residual connection, as each of several
        has. The published code leaves it out.
      dropout_prob: of item vectors and layers.
      d_state: N, the size of the state of each head.
      d_conv: taps of the causal convolutions.
      expand: width of the SSD layer, in units of `hidden_size`.
      head_dim: P, the width of a head.
      chunk_size: of the SSD op; 0 lets the op choose. Results do not depend on it.
      norm_eps: of all norms but that of the feed-forward networks.
      ssd_norm_eps: of the norm in an SSD layer, before its output projection; 0: `norm_eps`. That
        norm makes a weak signal as large as a strong one. With 1 a weak one stays weak, as in
        Mamba, which has no such norm. The layer then learns more in few epochs.
      is_ffn: whether layers have a feed-forward network.
      is_kai_ming_init: whether convolutions are initialised by Kaiming's rule.
      conv_path: the activation after the convolutions, "hardswish" or "silu". By default the one
        that the published code takes: "hardswish", or "silu" where H is a multiple of 8.
    """

    hidden_size: int = 64
    num_layers: int = count(2)
    single_layer_residual: bool = False
    dropout_prob: float = rate(0.2)
    d_state: int = 32
    d_conv: int = count(4)
    expand: int = 2
    head_dim: int = 32
    chunk_size: int = not_negative(0)
    norm_eps: float = 1e-12
    ssd_norm_eps: float = not_negative(0.0)
    is_ffn: bool = True
    is_kai_ming_init: bool = False
    conv_path: str = one_of("", "hardswish", "silu")

    def __post_init__(self):
        super().__post_init__()
        self.without_time()  # checks the heads

    @property
    def idle(self) -> tuple[str, ...]:
        """See `ModelSettings`."""
        return ("single_layer_residual",) if self.num_layers > 1 else ()

    def without_time(self) -> TiM4RecSettings:
        """The settings of TiM4Rec that make this model."""
        settings = dataclasses.asdict(self)
        return TiM4RecSettings(**settings, time_encoding="causal", is_time=False)


class SSD4Rec(CausalTiM4Rec):
    """Item embedding, dropout, norm; SSD blocks with feed-forward networks.

    TiM4Rec's comparison ran this model under the name SSD4Rec. The model of the SSD4Rec paper
    (arXiv 2409.01192) is another: its blocks read rows of several histories in both directions.
    """

    Settings = SSD4RecSettings  # pyright: ignore[reportAssignmentType]
    default_patience = 10

    def __init__(
        self,
        settings: SSD4RecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights; arguments as `SequenceModel`."""
        super().__init__(settings.without_time(), sizes, rngs=rngs, param_dtype=param_dtype)
