"""Multi-head attention, and the encoder layer of SASRec, BERT4Rec and TiSASRec."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float, Int, UInt32

from tim4rec_jax.layers.basic import ALL, NORMAL, Dense, dropout, fold, gelu, layer_norm
from tim4rec_jax.layers.checks import (
    check_divides,
    check_eps,
    check_rate,
    check_shape,
    check_sizes,
)
from tim4rec_jax.layers.lookup import Embedding
from tim4rec_jax.ssd import finite, finite_inputs
from tim4rec_jax.ssd.arrays import AnyArray
from tim4rec_jax.ssd.segments import first_positions

# Causal attention cuts the queries into at most 4 blocks of at least 25 positions. Most scores
# above the diagonal are then not computed. On a CPU this saves a third of the time of attention
# over 200 positions, and a sixth over 50.
_BLOCKS, _LEAST_BLOCK = 4, 25


def causal_mask(
    length: Any, segment_ids: Int[AnyArray, "B L"] | None = None
) -> Bool[Array, "#B 1 L L"]:
    """Returns a mask that is true for the keys up to the query's position in the same segment.

    Padding after a history needs no mask, because no position of the history looks that far.

    Args:
      length: L, the number of positions.
      segment_ids: a segment begins where the id differs from the one before. None: each row is one
        segment.
    """
    mask = jnp.tri(length, dtype=bool)[None, None]
    if segment_ids is None:
        return mask
    first = first_positions(segment_ids)  # ids may come back
    return mask & (first[:, None, :, None] == first[:, None, None, :])


def segment_positions(segment_ids: Int[AnyArray, "B L"]) -> Int[Array, "B L"]:
    """Returns the position of each event in its segment, counted from 0."""
    first = first_positions(segment_ids)
    return jnp.arange(first.shape[1]) - first


def take_rows(x: Float[Array, "B L D"], positions: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    """Returns the vectors at the given positions of each row."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)


@runtime_checkable
class Relation(Protocol):
    """How queries and keys are related besides their content, for example by time."""

    def block(self, queries: slice, keys: slice) -> "Relation":
        """Returns the part of the relation for a block of queries and the keys that they see."""
        ...

    def score(self, query: Float[Array, "B H Q P"]) -> Float[Array, "B H Q L"]:
        """Returns what is added to the scores; the queries are already scaled."""
        ...

    def add_up(self, weights: Float[Array, "B H Q L"]) -> Float[Array, "B H Q P"]:
        """Returns what is added to the weighted sum of the values."""
        ...


class Attention(nnx.Module):
    """softmax(Q K^T / sqrt(P)) V. Each head is a slice of the width, and all maps have a bias.

    A mask says what a query sees: `causal_mask(length, segment_ids)` for rows of one or several
    segments. There is no `step`, because what attention keeps of the past grows with it.

    What a query does not see never changes its output or a gradient, NaN and infinities included. A
    query that sees such a number, or has it, has NaN as its output.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        dropout_rate: float = 0.0,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        kernel_init: nnx.Initializer = NORMAL,
        out_init: nnx.Initializer | None = None,
    ):
        """Initialises all biases with 0.

        Args:
          width: D, in and out.
          heads: H, which must divide D.
          dropout_rate: of the weights of the keys, where there are seeds.
          dtype: of the activations.
          param_dtype: of the parameters.
          rngs: a stream `params`.
          kernel_init: initialiser of the maps; N(0, 0.02^2) by default.
          out_init: initialiser of the last map, behind the heads; None: the same.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width, heads=heads)
        check_divides("heads", heads, "width", width)
        check_rate("dropout_rate", dropout_rate)
        kwargs: dict = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.query, self.key, self.value = (
            Dense(width, width, kernel_init=kernel_init, **kwargs) for _ in range(3)
        )
        self.out = Dense(width, width, kernel_init=out_init or kernel_init, **kwargs)
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        h: Float[AnyArray, "B L D"],
        mask: Bool[AnyArray, "#B 1 #L L"],
        seeds: UInt32[Array, " B"] | None = None,
        relation: Relation | None = None,
        *,
        causal: bool = False,
    ) -> Float[Array, "B L D"]:
        """Attends from every position.

        Args:
          h: the input.
          mask: true for the keys that a query sees.
          seeds: one dropout seed for each row; None switches dropout off.
          relation: what queries and keys add to each other besides their content; None: nothing.
          causal: whether the mask hides all keys after a query. Then blocks of queries skip them.
        """
        check_shape("h", h, "B,L", self.query.kernel.shape[0])
        if finite.known():
            return self._attend(h, mask, seeds, relation, causal)
        bad = ~jnp.isfinite(h).all(-1)
        seen = bad[:, :, None] | (mask & bad[:, None, None, :])[:, 0]
        h = finite.zero_unless_finite(h)
        y = self._attend(h, mask, seeds, relation, causal)
        return jnp.where(seen.any(-1)[..., None], jnp.asarray(jnp.nan, y.dtype), y)

    def _attend(self, h, mask, seeds, relation, causal):
        query, key, value = (self._split(f(h)) for f in (self.query, self.key, self.value))
        query = query * self.scale
        length = h.shape[1]
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], length, length))
        if is_symbolic_dim(length):
            causal = False  # how many blocks there are would depend on the length
        size = max(_LEAST_BLOCK, -(-length // _BLOCKS)) if causal else length
        blocks = []
        for number, start in enumerate(range(0, int(length), int(size)) if causal else (0,)):
            queries, keys = slice(start, start + size), slice(start + size) if causal else ALL
            part = None if relation is None else relation.block(queries, keys)
            q = query[:, :, queries]
            scores = jnp.einsum("bhqp,bhkp->bhqk", q, key[:, :, keys])
            visible = mask[:, :, queries, keys]
            weights = self._weights(scores, q, visible, fold(seeds, number), part)
            y = jnp.einsum("bhqk,bhkp->bhqp", weights, value[:, :, keys])
            blocks.append(y if part is None else y + part.add_up(weights))
        return self._finish(jnp.concatenate(blocks, axis=2))

    def at(
        self,
        h: Float[Array, "B L D"],
        queries: Float[Array, "B Q D"],
        mask: Bool[Array, "#B 1 #Q L"],
        seeds: UInt32[Array, " B"] | None = None,
        relation: Relation | None = None,
    ) -> Float[Array, "B Q D"]:
        """Attends from some positions only.

        This computes no keys and no values. The few queries go through the transposed map of the
        keys, and the weighted sums of `h` go through the map of the values. The bias of the keys
        adds the same number to all scores of a query, so it changes nothing and is left out.

        Args:
          h: the input.
          queries: the rows of `h` at the positions.
          mask: true for the keys that a query sees.
          seeds: one dropout seed for each row; None switches dropout off.
          relation: what queries and keys add to each other besides their content; None: nothing.
        """
        query = self._split(self.query(queries)) * self.scale
        keys, values = (
            layer.kernel[...].astype(h.dtype).reshape(-1, self.heads, query.shape[-1])
            for layer in (self.key, self.value)
        )
        scores = jnp.einsum("bhqd,bkd->bhqk", jnp.einsum("bhqp,dhp->bhqd", query, keys), h)
        weights = self._weights(scores, query, mask, seeds, relation)
        y = jnp.einsum("bhqd,dhp->bhqp", jnp.einsum("bhqk,bkd->bhqd", weights, h), values)
        # After dropout the weights do not add up to 1, so the bias of the values is weighted too.
        bias: Any = self.value.bias
        bias = bias[...].astype(h.dtype).reshape(self.heads, 1, -1)
        y += weights.sum(-1, keepdims=True) * bias
        return self._finish(y if relation is None else y + relation.add_up(weights))

    def _split(self, x):
        """[B,L,D] -> [B,H,L,P]."""
        return x.reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2)

    def _weights(self, scores, query, mask, seeds, relation):
        """Returns the softmax in at least float32, after dropout."""
        if relation is not None:
            scores += relation.score(query)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        lowest = jnp.finfo(scores.dtype).min  # finite, so that a query without keys gives no NaN
        weights = jax.nn.softmax(jnp.where(mask, scores, lowest))
        return dropout(weights.astype(query.dtype), self.dropout_rate, seeds)

    def _finish(self, y):
        y = y.swapaxes(1, 2)
        return self.out(y.reshape(*y.shape[:2], -1))


class EncoderLayer(nnx.Module):
    """LayerNorm(drop(attention) + h), then LayerNorm(drop(W2 gelu(W1 h)) + h) with exact GELU.

    Inputs are taken to be finite, see `tim4rec_jax.ssd.finite_inputs`.
    """

    def __init__(
        self,
        width: int,
        *,
        inner: int | None = None,
        heads: int = 2,
        dropout_rate: float = 0.2,
        attention_dropout_rate: float = 0.2,
        eps: float = 1e-12,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises all maps with N(0, 0.02^2) and biases of 0.

        Args:
          width: D, of inputs and outputs.
          inner: width of the feed-forward network; None: 4 D.
          heads: H, which must divide D.
          dropout_rate: of both layers' outputs, where there are seeds.
          attention_dropout_rate: of the weights of the keys, where there are seeds.
          eps: of both norms.
          dtype: of the activations.
          param_dtype: of the parameters.
          rngs: a stream `params`.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        inner = 4 * width if inner is None else inner
        check_sizes(width=width, inner=inner)
        check_rate("dropout_rate", dropout_rate)
        check_eps(eps)
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.attention = Attention(width, heads, dropout_rate=attention_dropout_rate, **kwargs)
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)
        self.fc1, self.fc2 = Dense(width, inner, **kwargs), Dense(inner, width, **kwargs)
        self.out_norm = layer_norm(width, eps, dtype, param_dtype, rngs)
        self.dropout_rate = dropout_rate

    @finite_inputs()
    def __call__(
        self,
        h: Float[Array, "B L D"],
        mask: Bool[Array, "#B 1 #L L"],
        seeds: UInt32[Array, " B"] | None = None,
        relation: Relation | None = None,
        *,
        causal: bool = False,
    ) -> Float[Array, "B L D"]:
        """Computes all positions; the arguments are those of `Attention`."""
        y = self.attention(h, mask, fold(seeds, 0), relation, causal=causal)
        return self._finish(y, h, seeds)

    def at(
        self,
        h: Float[Array, "B L D"],
        positions: Int[Array, "B Q"],
        mask: Bool[Array, "#B 1 #Q L"],
        seeds: UInt32[Array, " B"] | None = None,
        relation: Relation | None = None,
    ) -> Float[Array, "B Q D"]:
        """Computes `__call__` at some positions, with their rows of mask and relation."""
        queries = take_rows(h, positions)
        y = self.attention.at(h, queries, mask, fold(seeds, 0), relation)
        return self._finish(y, queries, seeds)

    def _finish(self, y, h, seeds):
        return self._feed_forward(self._attended(y, h, seeds), seeds)

    def _attended(self, y, h, seeds):
        return self.norm(dropout(y, self.dropout_rate, fold(seeds, 1)) + h)

    def _feed_forward(self, h, seeds):
        y = self.fc2(gelu(self.fc1(h)))
        return self.out_norm(dropout(y, self.dropout_rate, fold(seeds, 2)) + h)


class Positions(nnx.Module):
    """LayerNorm(x + a learned vector for each position), then dropout."""

    def __init__(
        self,
        width: int,
        max_length: int,
        *,
        dropout_rate: float = 0.2,
        eps: float = 1e-12,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the vectors with N(0, 0.02^2).

        Args:
          width: D, of inputs and outputs.
          max_length: how many positions have a vector.
          dropout_rate: of the result, where there are seeds.
          eps: of the norm.
          dtype: of the activations.
          param_dtype: of the parameters.
          rngs: a stream `params`.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width, max_length=max_length)
        check_rate("dropout_rate", dropout_rate)
        check_eps(eps)
        self.embedding = Embedding(
            max_length,
            width,
            embedding_init=NORMAL,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: Float[Array, "B L D"],
        segment_ids: Int[Array, "B L"] | None = None,
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Counts positions from the start of each segment, or of each row without segments."""
        if segment_ids is None:
            vectors = self.embedding.embedding[: x.shape[1]].astype(x.dtype)
        else:
            vectors = self.embedding(segment_positions(segment_ids))
        return dropout(self.norm(x + vectors), self.dropout_rate, seeds)


def positions_and_layers(
    width: int,
    max_length: int,
    *,
    inner: int,
    layers: int,
    heads: int,
    dropout_rate: float,
    attention_dropout_rate: float,
    eps: float,
    dtype: Any,
    param_dtype: Any,
    rngs: nnx.Rngs,
) -> tuple[Positions, nnx.List]:
    """What SASRec, BERT4Rec and TiSASRec are made of, behind the item vectors.

    Args:
      width: D, of the item vectors and of all layers.
      max_length: number of positions.
      inner: inner width of the feed-forward networks.
      layers: number of layers.
      heads: number of heads of attention; it divides `width`.
      dropout_rate: of item vectors and of what a layer adds to them.
      attention_dropout_rate: of the weights of attention.
      eps: of all norms.
      dtype: of the activations.
      param_dtype: of the parameters.
      rngs: a stream `params`, from which the positions are drawn first.

    Returns:
      The learned positions, and the layers from the first to the last.
    """
    kwargs: dict[str, Any] = dict(
        dropout_rate=dropout_rate, eps=eps, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    positions = Positions(width, max_length, **kwargs)
    return positions, nnx.List(
        EncoderLayer(
            width,
            inner=inner,
            heads=heads,
            attention_dropout_rate=attention_dropout_rate,
            **kwargs,
        )
        for _ in range(layers)
    )
