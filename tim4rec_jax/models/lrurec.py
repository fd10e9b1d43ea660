"""LRURec: linear recurrent units over the history (arXiv 2310.02367)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers import FeedForward
from tim4rec_jax.layers.basic import gelu
from tim4rec_jax.layers.lru import LRU, LRUBlock
from tim4rec_jax.models.base import CausalBlocks

_EPS = 1e-5


class LRURec(CausalBlocks):
    """Item embedding, dropout, norm; linear recurrent units with feed-forward networks.

    The published code shifts histories to the right end of rows whose length is a power of two,
    and lets no state leave a padded position: the values are those of a recurrence that starts
    from zeros at the first event, which is what is computed here.

    Initial weights are its own too: all tensors but norms and decays come from one truncated
    normal, biases included, those of the scores as well; the real part of the input maps is no
    larger than in any dense layer, where the paper on the unit scales it by the width.
    """

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights as the published code does.

        Args:
          config: hidden_size, n_layers, dropout_prob; dtype of the activations, the states
            staying in float32.
          n_items: number of items, without padding.
          max_length: longest history; no weight depends on it.
          rngs: stream `params`.
          param_dtype: of parameters, norms and states: float32, or float64 for parity.
        """
        super().__init__(
            config,
            width=config["hidden_size"],
            layers=config["n_layers"],
            eps=_EPS,
            n_items=n_items,
            max_length=max_length,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.score_bias = nnx.Param(jnp.zeros((n_items + 1,), param_dtype))
        drawn = [
            param
            for path, param in nnx.to_flat_state(nnx.state(self, nnx.Param))
            if "norm" not in path and "params_log" not in path
        ]
        shapes = tuple(param.shape for param in drawn)
        values = _truncated_normal(rngs.params(), shapes, param_dtype)
        for param, value in zip(drawn, values, strict=True):
            param[...] = value

    def make_block(self, config, kwargs: dict) -> LRUBlock:
        """See `CausalBlocks`."""
        width, rate = config["hidden_size"], config["dropout_prob"]
        feed_forward = FeedForward(width, dropout_rate=rate, activation=gelu, eps=_EPS, **kwargs)
        return LRUBlock(
            LRU(width, states=2 * width, **kwargs),
            feed_forward,
            width=width,
            residual=True,
            dropout_rate=rate,
            eps=_EPS,
            **kwargs,
        )

    def item_table(self) -> Float[Array, "V E"]:
        """The vector of each item and, as the last column, its bias."""
        table = self.item_embedding.embedding[...]
        return jnp.concatenate([table, self.score_bias[...][:, None]], axis=1)

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L E"]:
        """See `SequenceModel`; the last number is 1, for the bias in `item_table`."""
        settings: dict = dict(segment_ids=segment_ids, dropout_seeds=dropout_seeds)
        return _with_one(super().__call__(items, lengths, gaps, **settings))

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B E"]:
        """See `SequenceModel` and `__call__`."""
        return _with_one(super().encode(items, lengths, gaps, dropout_seeds=dropout_seeds))

    def step(
        self, state: list, items: Int32[Array, "B"], gaps: Float[Array, "B"]
    ) -> tuple[list, Float[Array, "B E"]]:
        """See `SequenceModel` and `__call__`."""
        state, hidden = super().step(state, items, gaps)
        return state, _with_one(hidden)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _truncated_normal(key, shapes: tuple[tuple[int, ...], ...], dtype) -> list[jax.Array]:
    """N(0, 0.02^2) cut at two deviations, for all shapes at once: compiled once."""
    sizes = [math.prod(shape) for shape in shapes]
    drawn = 0.02 * jax.random.truncated_normal(key, -2.0, 2.0, (sum(sizes),), dtype)
    parts = jnp.split(drawn, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _with_one(h: jax.Array) -> jax.Array:
    return jnp.concatenate([h, jnp.ones_like(h[..., :1])], axis=-1)
