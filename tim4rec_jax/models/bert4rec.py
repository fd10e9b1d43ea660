"""BERT4Rec: attention to both sides, trained to fill gaps (arXiv 1904.06690), as compared."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import EncoderLayer, Positions
from tim4rec_jax.layers.basic import Dense, fold, gelu, layer_norm
from tim4rec_jax.models.base import SequenceModel


class BERT4Rec(SequenceModel):
    """SASRec's layers without its causal mask; objective `cloze` (`tim4rec_jax.training.objectives`).

    Row `n_items + 1` of `item_embedding` is the mask token: no item, and never a candidate. What
    TiM4Rec's comparison did, and this does too, although it costs the model something:
    - To predict, it puts the mask behind the history and drops the FIRST item, always, even
      where there is room for both.
    - The first position of a row is never a target (its index 0 looks like padding), so rows of
      one event teach nothing.
    - Rows are the prefixes that the other models train on, but the event after the prefix is
      ignored: the last training event of a user is neither a target nor an input.
    """

    special_rows = 2

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights: N(0, 0.02) for tables and maps, the padding row included.

        Args:
          config: hidden_size, inner_size, n_layers, n_heads, hidden_dropout_prob,
            attn_dropout_prob, layer_norm_eps; mask_ratio, the share of items masked; ft_ratio,
            the share of batches where only the last item is; dtype of the activations.
          n_items: number of items, without padding and mask.
          max_length: longest history.
          rngs: stream `params`.
          param_dtype: of parameters and norms: float32, or float64 for parity.
        """
        width = config["hidden_size"]
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype)
        self.mask_ratio, self.ft_ratio = config["mask_ratio"], config["ft_ratio"]
        self.positions = Positions(config, max_length, **kwargs)
        self.layers = nnx.List([EncoderLayer(config, **kwargs) for _ in range(config["n_layers"])])
        self.head = Dense(width, width, **kwargs)
        self.head_norm = layer_norm(width, config["layer_norm_eps"], self.dtype, param_dtype, rngs)
        self.output_bias = nnx.Param(jnp.zeros(n_items + 1, param_dtype))

    @property
    def mask_token(self) -> int:
        """The index that stands for an item to be filled in."""
        return self.n_items + 1

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`: what fills each position of `items` as they are, D one wider.

        Raises:
          ValueError: `segment_ids` are given.
        """
        del lengths, gaps
        if segment_ids is not None:
            raise ValueError("BERT4Rec sees whole rows: they hold one history each")
        h = self.positions(self.item_embedding(items), None, fold(dropout_seeds, 0))
        mask = _not_padding(items)
        for i, layer in enumerate(self.layers, 1):
            h = layer(h, mask, fold(dropout_seeds, i))
        return self._head(h)

    def fill(
        self,
        items: Int32[Array, "B L"],
        positions: Int[Array, "B M"],
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B M D"]:
        """`__call__` at some positions; the last layer computes nothing else."""
        h = self.positions(self.item_embedding(items), None, fold(dropout_seeds, 0))
        mask = _not_padding(items)
        *layers, last = self.layers
        for i, layer in enumerate(layers, 1):
            h = layer(h, mask, fold(dropout_seeds, i))
        return self._head(last.at(h, positions, mask, fold(dropout_seeds, len(layers) + 1)))

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """What fills a mask behind the history, for which its first item makes room."""
        del gaps
        end = lengths[:, None] - 1
        index = jnp.arange(items.shape[1])
        later = jnp.pad(items[:, 1:], ((0, 0), (0, 1)))
        asked = jnp.where(index < end, later, jnp.where(index == end, self.mask_token, 0))
        return self.fill(asked, end, dropout_seeds)[:, 0]

    def item_table(self) -> Float[Array, "V D"]:
        """The vectors of the items, without the mask, and their biases in the last column."""
        vectors = self.item_embedding.embedding[: self.n_items + 1]
        return jnp.concatenate([vectors, self.output_bias[...][:, None]], axis=1)

    def _head(self, h):
        h = self.head_norm(gelu(self.head(h)))
        return jnp.concatenate([h, jnp.ones_like(h[..., :1])], axis=-1)


def _not_padding(items: Int32[Array, "B L"]) -> Bool[Array, "B 1 1 L"]:
    return (items > 0)[:, None, None]
