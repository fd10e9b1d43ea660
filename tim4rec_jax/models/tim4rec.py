"""TiM4Rec: items and the gaps between them -> the next item (arXiv 2409.16182)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers import Block, FeedForward, TimeAwareSSD, TimeEncoder, TimeMixer
from tim4rec_jax.layers.basic import dropout, fold, layer_norm
from tim4rec_jax.models.base import SequenceModel
from tim4rec_jax.ssd.convolution import ACTIVATIONS

TIME_ENCODINGS = ("paper", "masked")


class TiM4Rec(SequenceModel):
    """The paper's model; field names of `config` are the reference's own.

    Not causal: the time stream looks ahead. Its weights are tied to `max_length`.
    """

    def __init__(
        self, config, *, n_items: int, max_length: int, rngs: nnx.Rngs, param_dtype=jnp.float32
    ):
        """Initialises the weights as the reference does.

        Args:
          config: hidden_size, num_layers, dropout_prob, time_drop_out, d_state, d_conv,
            expand, head_dim, chunk_size (0 or None: the op chooses), norm_eps, is_ffn,
            is_time, p2p_residual, is_kai_ming_init; time_encoding `paper` (as published)
            or `masked` (statistics over real events, exact gaps); dtype of the activations;
            conv_path, optional: `hardswish` or `silu` after the convolutions.
          n_items: number of items, without padding.
          max_length: longest history.
          rngs: stream `params`.
          param_dtype: of parameters, norms and decays: float32, or float64 for parity.
        """
        width = config["hidden_size"]
        inner = width * config["expand"]
        if inner % config["head_dim"]:
            raise ValueError(
                f"head_dim {config['head_dim']} does not divide expand * hidden_size = {inner}"
            )
        if config["time_encoding"] not in TIME_ENCODINGS:
            raise ValueError(
                f"time_encoding {config['time_encoding']!r} is not one of {TIME_ENCODINGS}"
            )
        kwargs = self.begin(config, width, n_items, max_length, rngs, param_dtype)
        self.masked = config["time_encoding"] == "masked"
        self.dropout_rate = config["dropout_prob"]
        eps = config["norm_eps"]
        self.norm = layer_norm(width, eps, self.dtype, param_dtype, rngs)
        self.time = (
            TimeEncoder(
                max_length,
                dropout_rate=self.dropout_rate,
                eps=eps,
                dtype=param_dtype,
                rngs=rngs,
            )
            if config["is_time"]
            else None
        )
        self.blocks = nnx.List(
            [_block(config, max_length, kwargs) for _ in range(config["num_layers"])]
        )

    def __call__(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """See `SequenceModel`; one history a row.

        L <= T = max_length: cutting L to the longest history of the batch changes nothing
        before `lengths`; `gaps` always have all T columns.
        """
        assert segment_ids is None, "the time stream looks at whole rows"
        h, tau, real = self._embed(items, lengths, gaps, dropout_seeds)
        for i, block in enumerate(self.blocks):
            h, tau = block(h, tau, real, fold(dropout_seeds, i + 1))
        return h

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, "B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1`, what the next item is predicted from.

        The last layer computes nothing else than that position (arguments as `__call__`).
        """
        h, tau, real = self._embed(items, lengths, gaps, dropout_seeds)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks[:last]):
            h, tau = block(h, tau, real, fold(dropout_seeds, i + 1))
        return self.blocks[last].last(h, tau, lengths, fold(dropout_seeds, last + 1))

    def masks(
        self, items: Int32[Array, "B L"], lengths: Int[Array, "B"], gaps: Float[Array, "B T"]
    ) -> list[Float[Array, "B H L L"]]:
        """See `SequenceModel`."""
        h, tau, real = self._embed(items, lengths, gaps, None)
        masks = []
        for block in self.blocks:
            masks.append(block.mask(h, tau))
            h, tau = block(h, tau, real)
        return masks

    def _embed(self, items, lengths, gaps, seeds):
        h = self.norm(dropout(self.item_embedding(items), self.dropout_rate, fold(seeds, 0)))
        if self.time is None:
            return h, None, None
        real = None
        if self.masked:
            real = (jnp.arange(gaps.shape[1]) < lengths[:, None])[:, None]
        return h, self.time(gaps, real, fold(seeds, -1)), real


def activation(config, heads: int):
    """The activation after the convolutions, as the reference chooses it.

    Its fast convolution runs for multiples of eight channels only, with SiLU; every released
    model has four heads and takes its other path, with hardswish.
    """
    return ACTIVATIONS[config.get("conv_path") or ("hardswish" if heads % 8 else "silu")]


def ssd_settings(config, kwargs: dict) -> dict:
    """Arguments of an `SSDLayer`; `kwargs` are its dtypes and rngs."""
    heads = config["hidden_size"] * config["expand"] // config["head_dim"]
    return dict(
        state=config["d_state"],
        head_width=config["head_dim"],
        expand=config["expand"],
        conv_width=config["d_conv"],
        chunk_size=config["chunk_size"] or None,
        activation=activation(config, heads),
        kaiming=config["is_kai_ming_init"],
        eps=config["norm_eps"],
        output_std=config.get("output_std", 0.02),  # a setting that older runs do not have
        **kwargs,
    )


def feed_forward(config, kwargs: dict) -> FeedForward | None:
    """The feed-forward network of a layer, if the model has them."""
    if not config["is_ffn"]:
        return None
    return FeedForward(config["hidden_size"], dropout_rate=config["dropout_prob"], **kwargs)


def block_settings(config, kwargs: dict) -> dict:
    """Arguments of a `ResidualBlock`."""
    return dict(
        width=config["hidden_size"],
        residual=config["num_layers"] > 1,
        dropout_rate=config["dropout_prob"],
        eps=config["norm_eps"],
        **kwargs,
    )


def _block(config, max_length: int, kwargs: dict) -> Block:
    ssd = TimeAwareSSD(config["hidden_size"], **ssd_settings(config, kwargs))
    mixer = None
    if config["is_time"]:
        mixer = TimeMixer(
            max_length,
            ssd.heads,
            width=config["d_conv"],
            activation=activation(config, ssd.heads),
            dropout_rate=config["time_drop_out"],
            gate_per_position=config["p2p_residual"],
            kaiming=config["is_kai_ming_init"],
            eps=config["norm_eps"],
            dtype=kwargs["param_dtype"],
            rngs=kwargs["rngs"],
        )
    return Block(ssd, mixer, feed_forward(config, kwargs), **block_settings(config, kwargs))
