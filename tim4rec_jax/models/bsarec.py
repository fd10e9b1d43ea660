"""BSARec: self-attention beside a filter of frequencies (arXiv 2312.10325)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float64, Int, Int32, UInt32

from tim4rec_jax.layers.attention import EncoderLayer, Positions, Relation, take_rows
from tim4rec_jax.layers.basic import dropout, fold, layer_norm
from tim4rec_jax.layers.lookup import without_padding
from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel, count, rate, share
from tim4rec_jax.ssd import finite_inputs

_EPS = 1e-12  # of all norms


@dataclasses.dataclass(frozen=True)
class BSARecSettings(ModelSettings):
    """Defaults are the paper's for Beauty. Its `alpha`, `c` and `n_heads` for ML-1M: .3, 9, 4.

    Attributes:
      hidden_size: D, the width of the item vectors.
      inner_size: inner width of the feed-forward networks.
      n_layers: number of layers.
      n_heads: number of heads; it must divide `hidden_size`.
      hidden_dropout_prob: of item vectors and of what a layer adds to them.
      attn_dropout_prob: of the weights of attention.
      alpha: share of the filter in a layer; attention has the rest.
      c: the c // 2 + 1 lowest frequencies, the mean among them, are the low ones.
    """

    hidden_size: int = 64
    inner_size: int = 256
    n_layers: int = count(2)
    n_heads: int = 1
    hidden_dropout_prob: float = rate(0.5)
    attn_dropout_prob: float = rate(0.5)
    alpha: float = share(0.7)
    c: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}; it must divide hidden_size = {self.hidden_size}"
            )


def low_pass(length: int, c: int) -> Float64[np.ndarray, "L L"]:
    """The map of a row to its c // 2 + 1 lowest frequencies (section 3.1 of the paper).

    It does what a Fourier transform, zeros at all other frequencies and the transform back do.
    """
    spectrum = np.fft.rfft(np.eye(length), axis=0)
    spectrum[c // 2 + 1 :] = 0
    return np.fft.irfft(spectrum, n=length, axis=0)


class BSARecLayer(EncoderLayer):
    """alpha F(h) + (1 - alpha) A(h), then the feed-forward network (equations 6 to 9 of the paper).

    A is SASRec's attention. F(h) = LayerNorm(drop(low + beta^2 (h - low)) + h), where low is
    `low_pass` of the row, so a position sees what follows it. beta has a number for each channel.
    """

    def __init__(
        self,
        settings: BSARecSettings,
        length: int,
        beta: Float[Array, " D"],
        *,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        width = settings.hidden_size
        super().__init__(
            width,
            inner=settings.inner_size,
            heads=settings.n_heads,
            dropout_rate=settings.hidden_dropout_prob,
            attention_dropout_rate=settings.attn_dropout_prob,
            eps=_EPS,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.beta = nnx.Param(beta)
        self.filter_norm = layer_norm(width, _EPS, dtype, param_dtype, rngs)
        self.alpha, self.length, self.c = settings.alpha, length, settings.c

    @finite_inputs()
    def __call__(
        self,
        h: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 L L"],
        seeds: UInt32[Array, " B"] | None = None,
        relation: Relation | None = None,
        *,
        causal: bool = False,
    ) -> Float[Array, "B L D"]:
        """All positions of rows of `length` positions; the arguments are those of `Attention`."""
        y = self.attention(h, mask, fold(seeds, 0), relation, causal=causal)
        low = jnp.einsum("qk,bkd->bqd", self._filters(h.dtype), h)
        return self._combine(y, low, h, seeds)

    @finite_inputs()
    def at(
        self,
        h: Float[Array, "B L D"],
        positions: Int[Array, "B Q"],
        mask: Bool[Array, "#B 1 #Q L"],
        seeds: UInt32[Array, " B"] | None = None,
        relation: Relation | None = None,
    ) -> Float[Array, "B Q D"]:
        """`__call__` at some positions, with their rows of mask and relation."""
        queries = take_rows(h, positions)
        y = self.attention.at(h, queries, mask, fold(seeds, 0), relation)
        low = jnp.einsum("bqk,bkd->bqd", self._filters(h.dtype)[positions], h)
        return self._combine(y, low, queries, seeds)

    def _filters(self, dtype):
        return jnp.asarray(low_pass(self.length, self.c), dtype)

    def _combine(self, y, low, h, seeds):
        """What follows attention `y` and the low frequencies, at positions with the inputs `h`."""
        filtered = low + self.beta[...].astype(h.dtype) ** 2 * (h - low)
        filtered = self.filter_norm(dropout(filtered, self.dropout_rate, fold(seeds, 3)) + h)
        mixed = self.alpha * filtered + (1 - self.alpha) * self._attended(y, h, seeds)
        return self._feed_forward(mixed, seeds)


class BSARec(SequenceModel):
    """Items and learned positions through layers of attention and of low and high frequencies.

    A frequency of a row is a sum over all of its positions. So a hidden state sees what follows it
    and what the row is padded with. There is one prediction for each row, at its last event, and
    neither rows of several histories nor a state that goes on event by event.

    As published, a history ends at position `max_length` of its row, however short it is, and
    padding has vectors of its own: they enter the frequencies, and its queries see all positions.
    """

    Settings = BSARecSettings

    def __init__(
        self,
        settings: BSARecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights as the authors' code does; arguments as `SequenceModel`."""
        width, length = settings.hidden_size, sizes.max_length
        super().__init__(settings, sizes, width=width, rngs=rngs, param_dtype=param_dtype)
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.positions = Positions(
            width, length, dropout_rate=settings.hidden_dropout_prob, eps=_EPS, **kwargs
        )
        # Their layers are copies of one, all of whose other weights are drawn again.
        beta = jax.random.normal(rngs.params(), (width,), param_dtype)
        self.layers = nnx.List(
            [BSARecLayer(settings, length, beta, **kwargs) for _ in range(settings.n_layers)]
        )

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`.

        Raises:
          ValueError: `segment_ids` are given.
        """
        del gaps
        if segment_ids is not None:
            raise ValueError(
                "a filter of frequencies sees whole rows: rows must be one history each"
            )
        h, mask = self._embed(items, lengths, dropout_seeds)
        for i, layer in enumerate(self.layers, 1):
            h = layer(h, mask, fold(dropout_seeds, i))
        moved = self.max_length - lengths[:, None] + jnp.arange(items.shape[1])
        return take_rows(h, jnp.minimum(moved, self.max_length - 1))

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; the last layer computes nothing but that position."""
        del gaps
        h, mask = self._embed(items, lengths, dropout_seeds)
        *layers, last = self.layers
        for i, layer in enumerate(layers, 1):
            h = layer(h, mask, fold(dropout_seeds, i))
        end = jnp.full((len(items), 1), self.max_length - 1)
        return last.at(h, end, mask[:, :, -1:], fold(dropout_seeds, len(layers) + 1))[:, 0]

    def _embed(self, items, lengths, seeds):
        """Moves each history to the end of a row of `max_length`; its vectors and the mask."""
        index = jnp.arange(self.max_length)
        source = index - (self.max_length - lengths[:, None])
        real = source >= 0
        items = jnp.take_along_axis(items, jnp.clip(source, 0, items.shape[1] - 1), axis=1)
        items = jnp.where(real, items, 0)
        # Padding has a part in every frequency, and learns nothing from it, as published.
        vectors = without_padding(self.item_embedding(items), items)
        h = self.positions(vectors, None, fold(seeds, 0))
        seen = real[:, None, None, :] & (index <= index[:, None])
        return h, seen | ~real[:, None, :, None]
