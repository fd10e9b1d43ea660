"""Whole layers: a layer that mixes the sequence, then a feed-forward network, each with a norm.

Models are made of them, and their inputs are finite: nothing looks for NaN here, see
`tim4rec_jax.ssd.finite_inputs`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from tim4rec_jax.layers.bands import BandsState, FrequencyBands
from tim4rec_jax.layers.basic import Dense, dropout, fold, layer_norm, take_position
from tim4rec_jax.layers.checks import activation_function, check_eps, check_rate, check_sizes
from tim4rec_jax.layers.ssd import CausalSSD, LayerState, TimeAwareSSD
from tim4rec_jax.layers.time import GapModulator, TimeMixer
from tim4rec_jax.ssd import finite_inputs


class FeedForward(nnx.Module):
    """LayerNorm(drop(W2 drop(f(W1 h))) + h) with inner width 4 D. f is hard-swish by default."""

    def __init__(
        self,
        width: int,
        *,
        dropout_rate: float = 0.2,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        activation: Callable[[jax.Array], jax.Array] | str = jax.nn.hard_swish,
        eps: float = 1e-12,
    ):
        """Initialises both maps with N(0, 0.02^2) and biases of 0.

        Args:
          width: D, of inputs and outputs.
          dropout_rate: of both dropouts, which run only where `__call__` gets seeds.
          dtype: of the activations.
          param_dtype: of the parameters.
          rngs: a stream `params`.
          activation: f, a function or one of "hardswish", "silu", "gelu", "relu" and "tanh".
          eps: of the norm.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width)
        check_rate("dropout_rate", dropout_rate)
        check_eps(eps)
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1, self.fc2 = Dense(width, 4 * width, **kwargs), Dense(4 * width, width, **kwargs)
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)
        self.dropout_rate, self.activation = dropout_rate, activation_function(activation)

    def __call__(
        self, h: Float[Array, "B ... D"], seeds: UInt32[Array, " B"] | None = None
    ) -> Float[Array, "B ... D"]:
        """Applies the network to each position on its own."""
        inner = dropout(self.activation(self.fc1(h)), self.dropout_rate, fold(seeds, 0))
        return self.norm(dropout(self.fc2(inner), self.dropout_rate, fold(seeds, 1)) + h)


class ResidualBlock(nnx.Module):
    """h = LayerNorm(drop(y) + h), then the feed-forward network. Subclasses compute y."""

    def __init__(
        self,
        feed_forward: FeedForward | None,
        *,
        width: int,
        residual: bool = True,
        dropout_rate: float = 0.2,
        eps: float = 1e-12,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the norm.

        Args:
          feed_forward: what follows; None: nothing.
          width: D, of inputs and outputs.
          residual: whether h is added to y.
          dropout_rate: of y, where there are seeds.
          eps: of the norm.
          dtype: of the activations.
          param_dtype: of the parameters.
          rngs: not used, as a norm starts from constants.

        Raises:
          ValueError: an argument does not fit; the message names it.
        """
        check_sizes(width=width)
        check_rate("dropout_rate", dropout_rate)
        check_eps(eps)
        self.feed_forward = feed_forward
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)
        self.residual, self.dropout_rate = residual, dropout_rate

    def finish(
        self,
        y: Float[Array, "B ... D"],
        h: Float[Array, "B ... D"],
        seeds: UInt32[Array, " B"] | None,
    ) -> Float[Array, "B ... D"]:
        """What follows the layer that mixes the sequence: `h` is its input, `y` its output."""
        y = dropout(y, self.dropout_rate, fold(seeds, 0))
        h = self.norm(y + h if self.residual else y)
        return h if self.feed_forward is None else self.feed_forward(h, fold(seeds, 1))


class Block(ResidualBlock):
    """A layer with the paper's time stream, or without time if it has no `mixer`.

    It takes no `segment_ids` and has no `step`, because the time stream sees whole rows.
    """

    def __init__(self, ssd: TimeAwareSSD, mixer: TimeMixer | None, *args, **kwargs):
        """Takes the layer, its time stream or None, and the arguments of `ResidualBlock`."""
        super().__init__(*args, **kwargs)
        self.ssd, self.mixer = ssd, mixer

    @finite_inputs()
    def __call__(
        self,
        h: Float[Array, "B L D"],
        tau: Float[Array, " B #H T"] | None,
        real: Bool[Array, "B 1 T"] | None,
        seeds: UInt32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B H T"] | None]:
        """Both streams after this layer.

        Args:
          h: item stream. L may be shorter than the T positions of the time stream.
          tau: time stream; None without a `mixer`.
          real: True where an event is (`masked`), or None (`paper`).
          seeds: dropout seeds of the rows; None switches dropout off.
        """
        factor, next_tau = self._time(tau, real, seeds)
        if factor is not None:
            factor = factor[:, :, : h.shape[1]].swapaxes(1, 2)
        return self.finish(self.ssd(h, factor), h, seeds), next_tau

    def mask(
        self, h: Float[Array, "B L D"], tau: Float[Array, " B #H T"] | None
    ) -> Float[Array, "B H L L"]:
        """The time-aware mask of the layer, see `SequenceModel.masks`."""
        factor = None
        if self.mixer is not None and tau is not None:
            factor = self.mixer(tau, None, h.shape[1]).swapaxes(1, 2)
        return self.ssd.mask(h, factor)

    @finite_inputs()
    def last(
        self,
        h: Float[Array, "B L D"],
        tau: Float[Array, " B #H T"] | None,
        lengths: Int[Array, " B"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """The item stream at position `lengths - 1`, for a model's last layer."""
        factor = None
        if self.mixer is not None and tau is not None:
            factor = self.mixer(tau, fold(seeds, 2), h.shape[1]).swapaxes(1, 2)
        y = self.ssd.last(h, factor, lengths)
        return self.finish(y, take_position(h, lengths - 1), seeds)

    def _time(self, tau, real, seeds):
        if self.mixer is None:
            return None, None
        factor = self.mixer(tau, fold(seeds, 2))
        return factor, self.mixer.advance(tau, factor, real, fold(seeds, 2))


class BlockState(NamedTuple):
    """What a layer with frequency bands keeps of the past."""

    layer: LayerState
    bands: BandsState


class CausalBlock(ResidualBlock):
    """A layer that the gaps modulate, or a layer without time if it has no `modulator`.

    With `bands`, the frequency bands of the input are added to what the layer gives.
    """

    def __init__(
        self,
        ssd: CausalSSD,
        modulator: GapModulator | None,
        *args,
        bands: FrequencyBands | None = None,
        **kwargs,
    ):
        """Takes the layer, what gaps do to it or None, and the arguments of `ResidualBlock`."""
        super().__init__(*args, **kwargs)
        self.ssd, self.modulator, self.bands = ssd, modulator, bands

    @finite_inputs()
    def __call__(
        self,
        h: Float[Array, "B L D"],
        features: Float[Array, "B L K"] | None,
        segment_ids: Int[Array, "B L"] | None,
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over rows of one or several histories.

        Args:
          h: item stream.
          features: `gap_features` of the gaps; None without a `modulator`.
          segment_ids: the number of the history that each position belongs to; None: each row is
            one history.
          seeds: dropout seeds of the rows; None switches dropout off.
        """
        y = self.ssd(h, self._time(features), segment_ids)
        if self.bands is not None:
            y = y + self.bands(h, segment_ids)
        return self.finish(y, h, seeds)

    def init_state(self, batch: int) -> LayerState | BlockState:
        """The state before the first event."""
        layer = self.ssd.init_state(batch)
        return layer if self.bands is None else BlockState(layer, self.bands.init_state(batch))

    def mask(
        self, h: Float[Array, "B L D"], features: Float[Array, "B L K"] | None
    ) -> Float[Array, "B H L L"]:
        """The time-aware mask of the layer, see `SequenceModel.masks`."""
        return self.ssd.mask(h, self._time(features))

    @finite_inputs()
    def last(
        self,
        h: Float[Array, "B L D"],
        features: Float[Array, "B L K"] | None,
        lengths: Int[Array, " B"],
        seeds: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history, for a model's last layer."""
        y = self.ssd.last(h, self._time(features), lengths)
        if self.bands is not None:
            y = y + self.bands.last(h, lengths)
        return self.finish(y, take_position(h, lengths - 1), seeds)

    def step(
        self,
        state: LayerState | BlockState,
        h: Float[Array, "B D"],
        features: Float[Array, "B K"] | None,
    ) -> tuple[LayerState | BlockState, Float[Array, "B D"]]:
        """`__call__` for one more event of each user."""
        layer = state.layer if isinstance(state, BlockState) else state
        layer, y = self.ssd.step(layer, h, self._time(features))
        if self.bands is None or not isinstance(state, BlockState):
            return layer, self.finish(y, h, None)
        bands, added = self.bands.step(state.bands, h)
        return BlockState(layer, bands), self.finish(y + added, h, None)

    def _time(self, features):
        return None if self.modulator is None else self.modulator(features)
