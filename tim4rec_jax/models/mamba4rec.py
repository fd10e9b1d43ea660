"""Mamba4Rec: Mamba blocks over the history (arXiv 2403.03900)."""

import jax.numpy as jnp
from flax import nnx

from tim4rec_jax.layers import FeedForward
from tim4rec_jax.layers.basic import gelu
from tim4rec_jax.layers.mamba import Mamba, MambaBlock
from tim4rec_jax.models.base import CausalBlocks

_EPS = 1e-12


class Mamba4Rec(CausalBlocks):
    """Item embedding, dropout, norm; Mamba blocks with feed-forward networks.

    A single layer has no residual connection around its Mamba block, as published. How the
    published code loses Mamba's initial step sizes, see `tim4rec_jax.layers.mamba.Mamba`.
    """

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights as the published code does.

        Args:
          config: hidden_size, num_layers, dropout_prob, d_state, d_conv, expand; dtype of the
            activations.
          n_items: number of items, without padding.
          max_length: longest history; no weight depends on it.
          rngs: stream `params`.
          param_dtype: of parameters, norms and states: float32, or float64 for parity.
        """
        super().__init__(
            config,
            width=config["hidden_size"],
            layers=config["num_layers"],
            eps=_EPS,
            n_items=n_items,
            max_length=max_length,
            rngs=rngs,
            param_dtype=param_dtype,
        )

    def make_block(self, config, kwargs: dict) -> MambaBlock:
        """See `CausalBlocks`."""
        width, rate = config["hidden_size"], config["dropout_prob"]
        mamba = Mamba(
            width,
            state=config["d_state"],
            conv_width=config["d_conv"],
            expand=config["expand"],
            **kwargs,
        )
        feed_forward = FeedForward(width, dropout_rate=rate, activation=gelu, eps=_EPS, **kwargs)
        return MambaBlock(
            mamba,
            feed_forward,
            width=width,
            residual=config["num_layers"] > 1,
            dropout_rate=rate,
            eps=_EPS,
            **kwargs,
        )
