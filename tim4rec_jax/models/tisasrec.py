"""TiSASRec: SASRec whose attention sees the time between events (WSDM 2020), as compared."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import EncoderLayer, Positions, causal_mask
from tim4rec_jax.layers.basic import dropout, fold
from tim4rec_jax.models.base import SequenceModel


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
    seeds: UInt32[Array, "B"] | None

    def block(self, queries: slice, keys: slice) -> "TimeRelation":
        """The part of a block of queries and the keys that they may see."""
        seeds = fold(self.seeds, queries.start)
        return self._replace(distance=self.distance[:, queries, keys], seeds=seeds)

    def score(self, query: Float[Array, "B H Q P"]) -> Float[Array, "B H Q L"]:
        """Query times the vector of each pair."""
        by_time = jnp.einsum("bhqp,shp->bhqs", query, self.keys)
        scores = jnp.take_along_axis(by_time, self.distance[:, None], axis=3)
        return dropout(scores, self.dropout_rate, fold(self.seeds, 0))

    def add_up(self, weights: Float[Array, "B H Q L"]) -> Float[Array, "B H Q P"]:
        """Sum of the vectors of a query's pairs by their weights."""
        weights = dropout(weights, self.dropout_rate, fold(self.seeds, 1))
        batch, heads, queries, _ = weights.shape
        b, h, q = jnp.ix_(jnp.arange(batch), jnp.arange(heads), jnp.arange(queries))
        sums = jnp.zeros((batch, heads, queries, len(self.values)), weights.dtype)
        sums = sums.at[b[..., None], h[..., None], q[..., None], self.distance[:, None]].add(
            weights
        )
        return jnp.einsum("bhqs,shp->bhqp", sums, self.values)


class TiSASRec(SequenceModel):
    """SASRec with two tables of `time_span` + 1 vectors, for keys and values, in all layers.

    What TiM4Rec's comparison did, and this does too:
    - Distances are whole seconds, cut at `time_span`, where the paper divides them by a user's
      shortest gap: with `time_span` 256 all that is told apart is events within 4 minutes.
    - They are differences of float32 times (`data.convention` "recbole"): multiples of 64 or
      128 seconds. "exact" gives every distance its own vector.

    One thing differs in training. The original looks up a vector for each pair, [B,L,L,D], and
    drops single numbers of it, one mask for all layers. Here a pair's whole vector of a head is
    dropped, anew in each layer: as often, and on its own for each pair, as there.
    """

    causal = True

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights: N(0, 0.02) for tables and maps, the padding row included.

        Args:
          config: hidden_size, inner_size, n_layers, n_heads, hidden_dropout_prob,
            attn_dropout_prob, layer_norm_eps, time_span in seconds; dtype of the activations.
          n_items: number of items, without padding.
          max_length: longest history.
          rngs: stream `params`.
          param_dtype: of parameters and norms: float32, or float64 for parity.
        """
        width = config["hidden_size"]
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype)
        self.time_span, self.heads = config["time_span"], config["n_heads"]
        self.dropout_rate = config["hidden_dropout_prob"]

        def table(rows: int) -> nnx.Embed:
            init = nnx.initializers.normal(0.02)
            return nnx.Embed(rows, width, embedding_init=init, **kwargs)

        self.time_keys, self.time_values = table(self.time_span + 1), table(self.time_span + 1)
        self.positions = Positions(config, max_length, **kwargs)
        self.layers = nnx.List([EncoderLayer(config, **kwargs) for _ in range(config["n_layers"])])

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
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
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
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
