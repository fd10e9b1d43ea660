"""Mamba4Rec: Mamba blocks over the history (arXiv 2403.03900)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from tim4rec_jax.layers import FeedForward
from tim4rec_jax.layers.basic import gelu
from tim4rec_jax.layers.mamba import Mamba, MambaBlock
from tim4rec_jax.models.base import CausalBlocks, DataSizes, ModelSettings, count, rate

_EPS = 1e-12  # of all norms


@dataclasses.dataclass(frozen=True)
class Mamba4RecSettings(ModelSettings):
    """Names are the published configuration's; defaults are those of TiM4Rec's comparison.

    Attributes:
      hidden_size: D, the width of the item vectors.
      num_layers: number of layers.
      single_layer_residual: whether a single layer has a residual connection, as each of several
        has. The published code leaves it out.
      dropout_prob: of item vectors and layers.
      d_state: N, the size of the state of each channel.
      d_conv: taps of the causal convolutions.
      expand: width of the Mamba layer, in units of `hidden_size`.
    """

    hidden_size: int = 64
    num_layers: int = count(2)
    single_layer_residual: bool = False
    dropout_prob: float = rate(0.2)
    d_state: int = 32
    d_conv: int = count(4)
    expand: int = 2

    @property
    def idle(self) -> tuple[str, ...]:
        """See `ModelSettings`."""
        return ("single_layer_residual",) if self.num_layers > 1 else ()


class Mamba4Rec(CausalBlocks):
    """Item embedding, dropout, norm; Mamba blocks with feed-forward networks.

    As published, a single layer has no residual connection around its Mamba block, unless
    `single_layer_residual` is set, and Mamba's own initial step sizes are lost (see
    `tim4rec_jax.layers.mamba.Mamba`).
    """

    Settings = Mamba4RecSettings
    default_patience = 20

    def __init__(
        self,
        settings: Mamba4RecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights as the published code does; arguments as `SequenceModel`."""
        width, dropout_rate = settings.hidden_size, settings.dropout_prob
        super().__init__(
            settings,
            sizes,
            width=width,
            dropout_rate=dropout_rate,
            eps=_EPS,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        around: dict[str, Any] = dict(dropout_rate=dropout_rate, eps=_EPS, **kwargs)

        def block() -> MambaBlock:
            mamba = Mamba(
                width,
                state=settings.d_state,
                conv_width=settings.d_conv,
                expand=settings.expand,
                **kwargs,
            )
            feed_forward = FeedForward(width, activation=gelu, **around)
            residual = settings.num_layers > 1 or settings.single_layer_residual
            return MambaBlock(mamba, feed_forward, width=width, residual=residual, **around)

        self.blocks = nnx.List([block() for _ in range(settings.num_layers)])
