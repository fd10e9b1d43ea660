"""TiSASRec: SASRec whose attention sees the time between events (WSDM 2020), as compared."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import causal_mask, positions_and_layers
from tim4rec_jax.layers.basic import dropout, fold
from tim4rec_jax.models.base import NORMAL, DataSizes, ModelSettings, SequenceModel, count, rate


def time_index(gaps: Float[Array, "B L"], span: int) -> Int32[Array, "B L L"]:
    """min(whole seconds between two events, `span`), for each event and those before it.

    Gaps are capped before they are added up: a longer one ends at `span` anyway, and the sums
    stay small enough to be exact in float32. (The original overflows where a gap has more
    milliseconds than an int32 holds.) Entries for events after the row's own are 0.
    """
    since = jnp.cumsum(jnp.clip(gaps, 0, span), axis=1)
    return jnp.clip(since[:, :, None] - since[:, None, :], 0, span).astype(jnp.int32)


class TimeRelation(NamedTuple):
    """A vector for each distance in time, beside the keys and beside the values.

    As products with all vectors of the table, from which those of each pair are picked, and as
    weights summed up by distance: [B,H,Q,span + 1] instead of a vector per pair.
    """

    distance: Int32[Array, "B Q L"]
    keys: Float[Array, "S H P"]
    values: Float[Array, "S H P"]
    dropout_rate: float
    seeds: UInt32[Array, " B"] | None

    def block(self, queries: slice, keys: slice) -> "TimeRelation":
        """The part of a block of queries and the keys that they may see."""
        seeds = fold(self.seeds, queries.start)
        return self._replace(distance=self.distance[:, queries, keys], seeds=seeds)

    def score(self, query: Float[Array, "B H Q P"]) -> Float[Array, "B H Q L"]:
        """Query times the vector of each pair."""
        # In at least float32: its gradient sums over all pairs of one distance.
        wide = jnp.promote_types(query.dtype, jnp.float32)
        by_time = jnp.einsum("bhqp,shp->bhqs", query, self.keys).astype(wide)
        scores = jnp.take_along_axis(by_time, self.distance[:, None], axis=3).astype(query.dtype)
        return dropout(scores, self.dropout_rate, fold(self.seeds, 0))

    def add_up(self, weights: Float[Array, "B H Q L"]) -> Float[Array, "B H Q P"]:
        """Sum of the vectors of a query's pairs by their weights."""
        weights = dropout(weights, self.dropout_rate, fold(self.seeds, 1))
        batch, heads, queries, _ = weights.shape
        b, h, q = jnp.ix_(jnp.arange(batch), jnp.arange(heads), jnp.arange(queries))
        # In at least float32: hundreds of weights can have one distance.
        wide = jnp.promote_types(weights.dtype, jnp.float32)
        sums = jnp.zeros((batch, heads, queries, len(self.values)), wide)
        sums = sums.at[b[..., None], h[..., None], q[..., None], self.distance[:, None]].add(
            weights.astype(wide)
        )
        return jnp.einsum("bhqs,shp->bhqp", sums.astype(weights.dtype), self.values)


@dataclasses.dataclass(frozen=True)
class TiSASRecSettings(ModelSettings):
    """Names are RecBole's; defaults are those of TiM4Rec's comparison.

    Attributes:
      hidden_size: D, the width of the item vectors.
      inner_size: inner width of the feed-forward networks.
      n_layers: number of layers.
      n_heads: number of heads; it must divide `hidden_size`.
      hidden_dropout_prob: of item vectors and of what a layer adds to them.
      attn_dropout_prob: of the weights of attention.
      layer_norm_eps: of all norms.
      time_span: distances in time are cut at so many seconds.
    """

    hidden_size: int = 64
    inner_size: int = 256
    n_layers: int = count(2)
    n_heads: int = 4
    hidden_dropout_prob: float = rate(0.2)
    attn_dropout_prob: float = rate(0.2)
    layer_norm_eps: float = 1e-12
    time_span: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}; it must divide hidden_size = {self.hidden_size}"
            )

    @property
    def convention(self) -> str:
        """See `ModelSettings`."""
        return "recbole"


class TiSASRec(SequenceModel):
    """SASRec with two tables of `time_span` + 1 vectors, one for keys and one for values.

    All layers share the tables. Two habits of TiM4Rec's comparison are kept:

    - Distances are whole seconds, cut at `time_span`. The paper divides them by the user's
      shortest gap. With a `time_span` of 256 the model only tells apart events within 4 minutes.
    - Distances are differences of float32 times (`data.convention` "recbole"), so they are
      multiples of 64 or 128 seconds. With "exact" every distance has its own vector.

    Dropout differs from the original in one way. The original looks up a vector for each pair of
    events, [B,L,L,D], and drops single numbers of these vectors, with one mask for all layers.
    This code drops the whole vector of a pair in a head, with a new mask in each layer. Each pair
    is dropped with the same probability as a number there, independently of the other pairs.
    """

    Settings = TiSASRecSettings
    causal = True

    def __init__(
        self,
        settings: TiSASRecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises tables and maps by N(0, 0.02^2), padding included, and biases by 0.

        Arguments are those of `SequenceModel`.
        """
        width, eps = settings.hidden_size, settings.layer_norm_eps
        super().__init__(settings, sizes, width=width, rngs=rngs, param_dtype=param_dtype)
        self.time_span, self.heads = settings.time_span, settings.n_heads
        self.dropout_rate = settings.hidden_dropout_prob

        def table() -> nnx.Embed:
            return nnx.Embed(
                self.time_span + 1,
                width,
                embedding_init=NORMAL,
                dtype=self.dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.time_keys, self.time_values = table(), table()
        self.positions, self.layers = positions_and_layers(
            width,
            sizes.max_length,
            inner=settings.inner_size,
            layers=settings.n_layers,
            heads=settings.n_heads,
            dropout_rate=settings.hidden_dropout_prob,
            attention_dropout_rate=settings.attn_dropout_prob,
            eps=eps,
            dtype=self.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
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
        """See `SequenceModel`; columns of `gaps` after L are unused."""
        del lengths  # what follows a position changes nothing there
        h = self.positions(self.item_embedding(items), segment_ids, fold(dropout_seeds, 0))
        mask = causal_mask(items.shape[1], segment_ids)
        index = time_index(gaps[:, : items.shape[1]], self.time_span)
        for i, layer in enumerate(self.layers, 1):
            seeds = fold(dropout_seeds, i)
            h = layer(h, mask, seeds, self._relation(index, seeds), causal=True)
        return h

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; the last layer computes nothing but that position."""
        length = items.shape[1]
        h = self.positions(self.item_embedding(items), None, fold(dropout_seeds, 0))
        index = time_index(gaps[:, :length], self.time_span)
        mask = causal_mask(length)
        *layers, last = self.layers
        for i, layer in enumerate(layers, 1):
            seeds = fold(dropout_seeds, i)
            h = layer(h, mask, seeds, self._relation(index, seeds), causal=True)
        seeds = fold(dropout_seeds, len(layers) + 1)
        end = lengths[:, None] - 1
        index = jnp.take_along_axis(index, end[..., None], axis=1)
        seen = (jnp.arange(length) <= end)[:, None, None]
        return last.at(h, end, seen, seeds, self._relation(index, seeds))[:, 0]

    def _relation(self, index, seeds):
        keys, values = (
            table.embedding[...].astype(self.dtype).reshape(len(table.embedding), self.heads, -1)
            for table in (self.time_keys, self.time_values)
        )
        return TimeRelation(index, keys, values, self.dropout_rate, fold(seeds, -1))
