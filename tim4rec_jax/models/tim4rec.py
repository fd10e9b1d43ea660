"""TiM4Rec: items and the gaps between them predict the next item (arXiv 2409.16182).

`TiM4Rec` is the paper's model, whose time stream sees whole rows. `CausalTiM4Rec` uses time without
looking ahead. `time_encoding` chooses between them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, UInt32

from tim4rec_jax.layers import (
    Block,
    CausalBlock,
    CausalSSD,
    FeedForward,
    GapModulator,
    TimeAwareSSD,
    TimeEncoder,
    TimeMixer,
    gap_features,
)
from tim4rec_jax.layers.bands import FrequencyBands
from tim4rec_jax.layers.basic import dropout, fold, layer_norm
from tim4rec_jax.layers.time import NextTime
from tim4rec_jax.models.base import (
    CausalBlocks,
    DataSizes,
    ModelSettings,
    SequenceModel,
    count,
    not_negative,
    one_of,
    rate,
)


@dataclasses.dataclass(frozen=True)
class TiM4RecSettings(ModelSettings):
    """Names and defaults are those of the 64-d configurations in the TiM4Rec repository.

    `time_encoding`, `single_layer_residual`, `ssd_norm_eps`, `output_std`, `knows_next_time`,
    `band_events` and `conv_path` are ours. Their defaults reproduce the published model.

    Attributes:
      time_encoding: "paper": the published time stream. "masked": the same, but its statistics
        are taken over real events only and gaps are exact. "causal": each event's own gap changes
        its step, and nothing looks ahead.
      hidden_size: D, the width of the item vectors.
      num_layers: number of layers.
      single_layer_residual: whether a single layer has a residual connection, as each of several
        has. The published code leaves it out, which costs quality.
      dropout_prob: of item vectors, layers, and the input of the time stream.
      time_drop_out: of the layers of the time stream.
      d_state: N, the size of the state of each head.
      d_conv: taps of the causal convolutions.
      expand: width of the SSD layer, in units of `hidden_size`.
      head_dim: P, the width of a head.
      chunk_size: of the SSD op; 0 lets the op choose. Results do not depend on it.
      norm_eps: of all norms but that of the feed-forward networks.
      ssd_norm_eps: of the norm in an SSD layer, before its output projection; 0: `norm_eps`. That
        norm makes a weak signal as large as a strong one. With 1 a weak one stays weak, as in
        Mamba, which has no such norm. The layer then learns more in few epochs.
      is_ffn: whether layers have a feed-forward network.
      is_time: whether the model uses time.
      p2p_residual: whether the gate of the time stream has a weight for each position.
      is_kai_ming_init: whether convolutions are initialised by Kaiming's rule.
      output_std: standard deviation of the initial weights of an SSD layer's output projection.
        The norm before that projection gives its input the size 1, however weak the layer's signal
        is. With less than the paper's 0.02 a new layer changes little, as in attention and Mamba.
      knows_next_time: whether predictions depend on the time of the next event. A recommender
        knows that time only if it is asked at that moment. Needs `time_encoding` "causal".
      band_events: reach, in events, of the moving average that splits the input of each layer into
        low and high frequencies, see `tim4rec_jax.layers.bands`. 0: a layer has no such bands.
        Needs `time_encoding` "causal".
      conv_path: the activation after the convolutions, "hardswish" or "silu". By default the one
        that the published code takes, see `activation`.
    """

    time_encoding: str = one_of("paper", "masked", "causal")
    hidden_size: int = 64
    num_layers: int = count(2)
    single_layer_residual: bool = False
    dropout_prob: float = rate(0.2)
    time_drop_out: float = rate(0.2)
    d_state: int = 32
    d_conv: int = count(4)
    expand: int = 2
    head_dim: int = 32
    chunk_size: int = not_negative(0)
    norm_eps: float = 1e-12
    ssd_norm_eps: float = not_negative(0.0)
    is_ffn: bool = True
    is_time: bool = True
    p2p_residual: bool = False
    is_kai_ming_init: bool = True
    output_std: float = 0.02
    knows_next_time: bool = False
    band_events: int = not_negative(0)
    conv_path: str = one_of("", "hardswish", "silu")

    def __post_init__(self):
        super().__post_init__()
        inner = self.expand * self.hidden_size
        if inner % self.head_dim:
            raise ValueError(
                f"head_dim is {self.head_dim}; it must divide expand * hidden_size = {inner}"
            )
        for name in ("knows_next_time", "band_events"):
            if (value := getattr(self, name)) and self.time_encoding != "causal":
                raise ValueError(
                    f"{name} is {value}, which needs config.model.time_encoding=causal; "
                    f"it is {self.time_encoding}"
                )

    @property
    def idle(self) -> tuple[str, ...]:
        """See `ModelSettings`."""
        return ("single_layer_residual",) if self.num_layers > 1 else ()

    @property
    def convention(self) -> str:
        """See `ModelSettings`."""
        return "recbole" if self.time_encoding == "paper" else "exact"

    @property
    def heads(self) -> int:
        """H, the number of heads."""
        return self.expand * self.hidden_size // self.head_dim

    @property
    def activation(self) -> str:
        """The activation after the convolutions.

        The published code has a fast convolution that runs for multiples of eight channels only and
        applies SiLU. Every released model has four heads, takes the other path, and so applies
        hard-swish.
        """
        return self.conv_path or ("hardswish" if self.heads % 8 else "silu")


class TiM4Rec(SequenceModel):
    """The paper's model.

    It is not causal, because the time stream looks ahead. Its weights depend on `max_length`.
    """

    Settings = TiM4RecSettings
    default_patience = 20

    @classmethod
    def variant(cls, settings: TiM4RecSettings) -> type[SequenceModel]:
        """See `SequenceModel`."""
        return CausalTiM4Rec if settings.time_encoding == "causal" else cls

    def __init__(
        self,
        settings: TiM4RecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights as the published code does; arguments as `SequenceModel`."""
        width, eps, length = settings.hidden_size, settings.norm_eps, sizes.max_length
        super().__init__(settings, sizes, width=width, rngs=rngs, param_dtype=param_dtype)
        self.masked = settings.time_encoding == "masked"
        self.dropout_rate = settings.dropout_prob
        self.norm = layer_norm(width, eps, self.dtype, param_dtype, rngs)
        time: dict[str, Any] = dict(eps=eps, dtype=param_dtype, rngs=rngs)
        self.time = (
            TimeEncoder(length, dropout_rate=self.dropout_rate, **time)
            if settings.is_time
            else None
        )

        def block() -> Block:
            ssd = TimeAwareSSD(width, **ssd_arguments(settings, self.dtype, param_dtype, rngs))
            mixer = None
            if settings.is_time:
                mixer = TimeMixer(
                    length,
                    settings.heads,
                    width=settings.d_conv,
                    activation=settings.activation,
                    dropout_rate=settings.time_drop_out,
                    gate_per_position=settings.p2p_residual,
                    kaiming=settings.is_kai_ming_init,
                    **time,
                )
            arguments = block_arguments(settings, self.dtype, param_dtype, rngs)
            return Block(ssd, mixer, **arguments)

        self.blocks = nnx.List([block() for _ in range(settings.num_layers)])

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

        `gaps` always have T = `max_length` columns. L may be shorter, down to the longest history
        of the batch; that changes nothing before `lengths`.

        Raises:
          ValueError: `segment_ids` are given.
        """
        if segment_ids is not None:
            raise ValueError("the time stream sees whole rows: each row must be one history")
        h, tau, real = self._embed(items, lengths, gaps, dropout_seeds)
        for i, block in enumerate(self.blocks):
            h, tau = block(h, tau, real, fold(dropout_seeds, i + 1))
        return h

    def encode(
        self,
        items: Int32[Array, "B L"],
        lengths: Int[Array, " B"],
        gaps: Float[Array, "B T"],
        *,
        dropout_seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """See `SequenceModel` and `__call__`. The last layer computes only the last events."""
        h, tau, real = self._embed(items, lengths, gaps, dropout_seeds)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks[:last]):
            h, tau = block(h, tau, real, fold(dropout_seeds, i + 1))
        return self.blocks[last].last(h, tau, lengths, fold(dropout_seeds, last + 1))

    def masks(
        self, items: Int32[Array, "B L"], lengths: Int[Array, " B"], gaps: Float[Array, "B T"]
    ) -> list[Float[Array, "B H L L"]]:
        """See `SequenceModel`."""
        h, tau, real = self._embed(items, lengths, gaps, None)
        masks = []
        for block in self.blocks:
            masks.append(block.mask(h, tau))
            h, tau = block(h, tau, real)
        return masks

    def _embed(self, items, lengths, gaps, seeds):
        """The item stream, the time stream, and where real events are (`masked` only)."""
        h = self.norm(dropout(self.item_embedding(items), self.dropout_rate, fold(seeds, 0)))
        if self.time is None:
            return h, None, None
        real = None
        if self.masked:
            real = (jnp.arange(gaps.shape[1]) < lengths[:, None])[:, None]
        return h, self.time(gaps, real, fold(seeds, -1)), real


class CausalTiM4Rec(CausalBlocks):
    """TiM4Rec with a causal use of time, see `tim4rec_jax.layers.CausalSSD`.

    Every position predicts the event after it, from the events up to it and their gaps. Of the
    settings it does not use `time_drop_out` and `p2p_residual`, which belong to the time stream.
    """

    Settings = TiM4RecSettings
    default_patience = 20

    def __init__(
        self,
        settings: TiM4RecSettings,
        sizes: DataSizes,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        """Initialises the weights; arguments as `SequenceModel`."""
        self.is_time, self.knows_next_time = settings.is_time, settings.knows_next_time
        width, eps = settings.hidden_size, settings.norm_eps
        super().__init__(
            settings,
            sizes,
            width=width,
            dropout_rate=settings.dropout_prob,
            eps=eps,
            rngs=rngs,
            param_dtype=param_dtype,
        )

        def block() -> CausalBlock:
            ssd = CausalSSD(width, **ssd_arguments(settings, self.dtype, param_dtype, rngs))
            modulator = None
            if settings.is_time:
                modulator = GapModulator(width, settings.heads, param_dtype=param_dtype)
            bands = None
            if settings.band_events:
                bands = FrequencyBands(width, settings.band_events, param_dtype=param_dtype)
            arguments = block_arguments(settings, self.dtype, param_dtype, rngs)
            return CausalBlock(ssd, modulator, bands=bands, **arguments)

        self.blocks = nnx.List([block() for _ in range(settings.num_layers)])
        self.next_time = (
            NextTime(width, eps=eps, dtype=self.dtype, param_dtype=param_dtype, rngs=rngs)
            if self.knows_next_time
            else None
        )

    def at(self, hidden: Float[Array, "*batch D"], wait: Float[Array, "*batch"]) -> jax.Array:
        """See `SequenceModel`."""
        if self.next_time is None:
            return super().at(hidden, wait)
        return self.next_time(hidden, gap_features(wait))

    def masks(
        self, items: Int32[Array, "B L"], lengths: Int[Array, " B"], gaps: Float[Array, "B T"]
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


def ssd_arguments(settings: TiM4RecSettings, dtype, param_dtype, rngs: nnx.Rngs) -> dict[str, Any]:
    """Arguments of `TimeAwareSSD` and `CausalSSD`."""
    return dict(
        state=settings.d_state,
        head_width=settings.head_dim,
        expand=settings.expand,
        conv_width=settings.d_conv,
        chunk_size=settings.chunk_size or None,
        activation=settings.activation,
        kaiming=settings.is_kai_ming_init,
        eps=settings.ssd_norm_eps or settings.norm_eps,
        output_std=settings.output_std,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def block_arguments(
    settings: TiM4RecSettings, dtype, param_dtype, rngs: nnx.Rngs
) -> dict[str, Any]:
    """Arguments of `Block` and `CausalBlock`: the feed-forward network and what is around it."""
    kwargs: dict[str, Any] = dict(
        dropout_rate=settings.dropout_prob, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )
    return dict(
        feed_forward=FeedForward(settings.hidden_size, **kwargs) if settings.is_ffn else None,
        width=settings.hidden_size,
        residual=settings.num_layers > 1 or settings.single_layer_residual,
        eps=settings.norm_eps,
        **kwargs,
    )
