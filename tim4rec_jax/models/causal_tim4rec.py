"""TiM4Rec with a causal use of time: `time_encoding="causal"` (see `tim4rec_jax.layers.causal`)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers import CausalBlock, CausalSSD, GapModulator, gap_features
from tim4rec_jax.layers.block import layer_norm
from tim4rec_jax.layers.causal import LayerState, NextTime
from tim4rec_jax.layers.dropout import dropout, fold
from tim4rec_jax.models.sequence_model import SequenceModel
from tim4rec_jax.models.tim4rec import block_settings, feed_forward, ssd_settings


class CausalTiM4Rec(SequenceModel):
    """Every position predicts the event after it, from the events up to it and their gaps.

    No weight depends on `max_length`.
    """

    causal = streams = True

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights; arguments as for `TiM4Rec`.

        Of `config` it does not use `time_drop_out` and `p2p_residual`, which belong to the
        time stream, and uses `knows_next_time` besides.
        """
        width, eps, layers = config["hidden_size"], config["norm_eps"], config["num_layers"]
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype)
        self.dropout_rate, self.is_time = config["dropout_prob"], config["is_time"]
        self.norm = layer_norm(width, eps, self.dtype, param_dtype, rngs)
        self.blocks = nnx.List([_block(config, kwargs) for _ in range(layers)])
        self.knows_next_time = config["knows_next_time"]
        self.next_time = NextTime(width, eps=eps, **kwargs) if self.knows_next_time else None

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`; `gaps` are exact, columns after L unused."""
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

    def at(self, hidden: Float[Array, "*batch D"], wait: Float[Array, "*batch"]) -> jax.Array:
        """See `SequenceModel`."""
        if self.next_time is None:
            return super().at(hidden, wait)
        return self.next_time(hidden, gap_features(wait))

    def init_state(self, batch: int) -> list[LayerState]:
        """See `SequenceModel`."""
        return [block.ssd.init_state(batch) for block in self.blocks]

    def step(
        self, state: list[LayerState], items: Int32[Array, "B"], gaps: Float[Array, "B"]
    ) -> tuple[list[LayerState], Float[Array, "B D"]]:
        """See `SequenceModel`."""
        h, features = self._embed(items, None), self._features(gaps)
        following = []
        for block, layer in zip(self.blocks, state, strict=True):
            layer, h = block.step(layer, h, features)
            following.append(layer)
        return following, h

    def masks(
        self, items: Int32[Array, "B L"], lengths: Int[Array, "B"], gaps: Float[Array, "B T"]
    ) -> list[Float[Array, "B H L L"]]:
        """See `SequenceModel`."""
        del lengths
        h, features = self._embed(items, None), self._features(gaps[:, : items.shape[1]])
        masks = []
        for block in self.blocks:
            masks.append(block.mask(h, features))
            h = block(h, features, None)
        return masks

    def _embed(self, items, seeds):
        return self.norm(dropout(self.item_embedding(items), self.dropout_rate, seeds))

    def _features(self, gaps):
        if not self.is_time:
            return None
        return gap_features(gaps.astype(self.item_embedding.embedding.dtype))


def _block(config, kwargs: dict) -> CausalBlock:
    ssd = CausalSSD(config["hidden_size"], **ssd_settings(config, kwargs))
    modulator = None
    if config["is_time"]:
        modulator = GapModulator(
            config["hidden_size"], ssd.heads, param_dtype=kwargs["param_dtype"]
        )
    return CausalBlock(
        ssd, modulator, feed_forward(config, kwargs), **block_settings(config, kwargs)
    )
