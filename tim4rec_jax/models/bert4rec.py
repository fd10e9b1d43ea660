"""BERT4Rec: attention to both sides, trained to fill gaps (arXiv 1904.06690), as compared."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from tim4rec_jax.layers.attention import positions_and_layers
from tim4rec_jax.layers.basic import Dense, fold, gelu, layer_norm
from tim4rec_jax.models.base import DataSizes, ModelSettings, SequenceModel, count, rate, share


@dataclasses.dataclass(frozen=True)
class BERT4RecSettings(ModelSettings):
    """Names are RecBole's; defaults are those of TiM4Rec's comparison.

    Attributes:
      hidden_size: D, the width of the item vectors.
      inner_size: inner width of the feed-forward networks.
      n_layers: number of layers.
      n_heads: number of heads; it must divide `hidden_size`.
      hidden_dropout_prob: of item vectors and of what a layer adds to them.
      attn_dropout_prob: of the weights of attention.
      layer_norm_eps: of all norms.
      mask_ratio: share of the items that training masks.
      ft_ratio: share of the batches in which training masks the last item only.
    """

    hidden_size: int = 64
    inner_size: int = 256
    n_layers: int = count(2)
    n_heads: int = 2
    hidden_dropout_prob: float = rate(0.4)
    attn_dropout_prob: float = rate(0.4)
    layer_norm_eps: float = 1e-12
    mask_ratio: float = rate(0.2)
    ft_ratio: float = share(0.5)

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.n_heads:
            raise ValueError(
                f"n_heads is {self.n_heads}; it must divide hidden_size = {self.hidden_size}"
            )


class BERT4Rec(SequenceModel):
    """SASRec's layers without the causal mask, trained to fill masked items in.

    The objective is `cloze` of `tim4rec_jax.training.objectives`. Row `n_items + 1` of
    `item_embedding` is the mask token, which is no item and never a candidate. Three habits of
    TiM4Rec's comparison are kept, although they cost the model something:

    - To predict, it puts the mask behind the history and always drops the FIRST item, even where
      there is room for both.
    - The first position of a row is never a target, because its index 0 looks like padding. Rows
      of one event therefore teach nothing.
    - Rows are the prefixes that the other models train on, but the event after the prefix is
      ignored. The last training event of a user is neither a target nor an input.
    """

    Settings = BERT4RecSettings
    default_objective = "cloze"
    special_rows = 2
    item_rows = (*SequenceModel.item_rows, "output_bias")

    def __init__(
        self,
        settings: BERT4RecSettings,
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
        self.mask_ratio, self.ft_ratio = settings.mask_ratio, settings.ft_ratio
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
        self.head = Dense(width, width, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.head_norm = layer_norm(width, eps, self.dtype, param_dtype, rngs)
        self.output_bias = nnx.Param(jnp.zeros(sizes.n_items + 1, param_dtype))

    @property
    def mask_token(self) -> int:
        """The index that stands for an item to be filled in."""
        return self.n_items + 1

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, " B"] | None = None,
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
        dropout_seeds: UInt32[Array, " B"] | None = None,
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
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
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
        vectors, biases = self.item_vectors(), self.output_bias[...][:, None]
        count = self.n_items + 1
        return jnp.concatenate([vectors[:count], biases[:count]], axis=1)

    def _head(self, h):
        h = self.head_norm(gelu(self.head(h)))
        return jnp.concatenate([h, jnp.ones_like(h[..., :1])], axis=-1)


def _not_padding(items: Int32[Array, "B L"]) -> Bool[Array, "B 1 1 L"]:
    return (items > 0)[:, None, None]
