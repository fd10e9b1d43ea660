"""TiM4Rec with a causal use of time: `time_encoding="causal"` (see `tim4rec_jax.layers.ssd`)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from tim4rec_jax.layers import CausalBlock, CausalSSD, GapModulator, gap_features
from tim4rec_jax.layers.time import NextTime
from tim4rec_jax.models.base import CausalBlocks
from tim4rec_jax.models.tim4rec import block_settings, feed_forward, ssd_settings


class CausalTiM4Rec(CausalBlocks):
    """Every position predicts the event after it, from the events up to it and their gaps."""

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights; arguments as for `TiM4Rec`.

        Of `config` it does not use `time_drop_out` and `p2p_residual`, which belong to the
        time stream, and uses `knows_next_time` besides.
        """
        self.is_time, self.knows_next_time = config["is_time"], config["knows_next_time"]
        width, eps = config["hidden_size"], config["norm_eps"]
        super().__init__(
            config,
            width=width,
            layers=config["num_layers"],
            eps=eps,
            n_items=n_items,
            max_length=max_length,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        kwargs: dict[str, Any] = dict(dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
        self.next_time = NextTime(width, eps=eps, **kwargs) if self.knows_next_time else None

    def make_block(self, config, kwargs: dict) -> CausalBlock:
        """See `CausalBlocks`."""
        width, modulator = config["hidden_size"], None
        ssd = CausalSSD(width, **ssd_settings(config, kwargs))
        if config["is_time"]:
            modulator = GapModulator(width, ssd.heads, param_dtype=kwargs["param_dtype"])
        return CausalBlock(
            ssd, modulator, feed_forward(config, kwargs), **block_settings(config, kwargs)
        )

    def at(self, hidden: Float[Array, "*batch D"], wait: Float[Array, "*batch"]) -> jax.Array:
        """See `SequenceModel`."""
        if self.next_time is None:
            return super().at(hidden, wait)
        return self.next_time(hidden, gap_features(wait))

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

    def _features(self, gaps):
        if not self.is_time:
            return None
        return gap_features(gaps.astype(self.item_embedding.embedding.dtype))
