"""What models have in common that are a stack of causal layers with a state of fixed size."""

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers.block import layer_norm
from tim4rec_jax.layers.dropout import dropout, fold
from tim4rec_jax.models.sequence_model import SequenceModel


class CausalBlocks(SequenceModel):
    """Item embedding, dropout, norm, then layers with the methods of `CausalBlock`.

    Every position predicts the event after it; no weight depends on `max_length`.
    """

    causal = streams = True

    def __init__(
        self,
        config,
        *,
        width: int,
        layers: int,
        eps: float,
        n_items: int,
        max_length: int,
        rngs: nnx.Rngs,
        param_dtype,
    ):
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype)
        self.dropout_rate = config["dropout_prob"]
        self.norm = layer_norm(width, eps, self.dtype, param_dtype, rngs)
        self.blocks = nnx.List([self.make_block(config, kwargs) for _ in range(layers)])

    def make_block(self, config, kwargs: dict) -> Any:
        """A layer; `kwargs` are its dtypes and rngs."""
        raise NotImplementedError

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`; of `gaps` columns after L are not used."""
        del lengths  # what follows a position changes nothing there
        h = self._embed(items, fold(dropout_seeds, 0))
        features = self._features(gaps[:, : items.shape[1]])
        for i, block in enumerate(self.blocks):
            h = block(h, features, segment_ids, fold(dropout_seeds, i + 1))
        return h

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel`; the last layer computes nothing else than that position."""
        h = self._embed(items, fold(dropout_seeds, 0))
        features = self._features(gaps[:, : items.shape[1]])
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks[:last]):
            h = block(h, features, None, fold(dropout_seeds, i + 1))
        return self.blocks[last].last(h, features, lengths, fold(dropout_seeds, last + 1))

    def init_state(self, batch: int) -> list:
        """See `SequenceModel`."""
        return [block.init_state(batch) for block in self.blocks]

    def step(
        self, state: list, items: Int32[Array, "B"], gaps: Float[Array, "B"]
    ) -> tuple[list, Float[Array, "B D"]]:
        """See `SequenceModel`."""
        h, features, following = self._embed(items, None), self._features(gaps), []
        for block, layer in zip(self.blocks, state, strict=True):
            layer, h = block.step(layer, h, features)
            following.append(layer)
        return following, h

    def _features(self, gaps: Float[Array, "*batch"]) -> Float[Array, "*batch K"] | None:
        """What the layers are told of the gaps; nothing, unless a subclass does."""
        del gaps
        return None

    def _embed(self, items, seeds):
        return self.norm(dropout(self.item_embedding(items), self.dropout_rate, seeds))
