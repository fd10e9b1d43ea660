"""LRURec: linear recurrent units over the history (arXiv 2310.02367)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers import FeedForward
from tim4rec_jax.layers.basic import gelu
from tim4rec_jax.layers.lru import LRU, LRUBlock
from tim4rec_jax.models.base import CausalBlocks, DataSizes, ModelSettings, count, rate

_EPS = 1e-5  # of all norms


@dataclasses.dataclass(frozen=True)
class LRURecSettings(ModelSettings):
    """Names are the published configuration's; defaults are those of TiM4Rec's comparison.

    Attributes:
      hidden_size: D, the width of the item vectors.
      n_layers: number of layers.
      dropout_prob: of item vectors and layers.
    """

    hidden_size: int = 64
    n_layers: int = count(2)
    dropout_prob: float = rate(0.2)


class LRURec(CausalBlocks):
    """Item embedding, dropout, norm; linear recurrent units with feed-forward networks.

    The published code shifts histories to the right end of rows whose length is a power of two,
    and lets no state leave a padded position. That computes a recurrence which starts from zeros
    at the first event, and so does this code.

    The initial weights are the published code's too. All tensors but norms and decays are drawn
    from one truncated normal distribution, biases included. The real part of the input maps is
    therefore no larger than in any dense layer; the paper on the unit scales it by the width.
    """

    Settings = LRURecSettings
    item_rows = (*CausalBlocks.item_rows, "score_bias")

    def __init__(
        self,
        settings: LRURecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights as the published code does; arguments as `SequenceModel`.

        States are kept in the dtype of the parameters, whatever that of the activations is.
        """
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

        def block() -> LRUBlock:
            feed_forward = FeedForward(width, activation=gelu, **around)
            lru = LRU(width, states=2 * width, **kwargs)
            return LRUBlock(lru, feed_forward, width=width, residual=True, **around)

        self.blocks = nnx.List([block() for _ in range(settings.n_layers)])
        self.score_bias = nnx.Param(jnp.zeros((sizes.n_items + 1,), param_dtype))
        drawn = [
            param
            for path, param in nnx.to_flat_state(nnx.state(self, nnx.Param))
            # What is added to scores begins at zero, as in all models.
            if not {"norm", "params_log", "maps", "offset", "last_offset", "drift"} & set(path)
        ]
        shapes = tuple(param.shape for param in drawn)
        values = _truncated_normal(rngs.params(), shapes, param_dtype)
        for param, value in zip(drawn, values, strict=True):
            param[...] = value
        if self.feature_maps is not None:
            self.item_embedding.clear_untrained()
            self.score_bias[...] *= self.item_embedding.trained()[: sizes.n_items + 1]

    def item_table(self) -> Float[Array, "V E"]:
        """The vector of each item and, as the last column, its bias."""
        table = self.item_vectors()
        return jnp.concatenate([table, self.score_bias[...][:, None]], axis=1)

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L E"]:
        """See `SequenceModel`; the last number is 1, for the bias in `item_table`."""
        settings: dict = dict(segment_ids=segment_ids, dropout_seeds=dropout_seeds)
        return _with_one(super().__call__(items, lengths, gaps, **settings))

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B E"]:
        """See `SequenceModel` and `__call__`."""
        return _with_one(super().encode(items, lengths, gaps, dropout_seeds=dropout_seeds))

    def step(
        self, state: list, items: Int32[Array, " B"], gaps: Float[Array, " B"]
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
