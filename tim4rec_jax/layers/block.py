"""Whole layers: a layer that mixes the sequence, then a feed-forward network, each with a norm."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from tim4rec_jax.layers.basic import Dense, dropout, fold, layer_norm, take_position
from tim4rec_jax.layers.ssd import CausalSSD, LayerState, TimeAwareSSD
from tim4rec_jax.layers.time import GapModulator, TimeMixer


class FeedForward(nnx.Module):
    """LayerNorm(drop(W2 drop(f(W1 h))) + h) with inner width 4 D. f is hard-swish by default."""

    def __init__(
        self,
        width: int,
        *,
        dropout_rate: float,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
        activation=jax.nn.hard_swish,
        eps: float = 1e-12,
    ):
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1, self.fc2 = Dense(width, 4 * width, **kwargs), Dense(4 * width, width, **kwargs)
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)
        self.dropout_rate, self.activation = dropout_rate, activation

    def __call__(
        self, h: Float[Array, "B ... D"], seeds: UInt32[Array, "B"] | None = None
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
        residual: bool,
        dropout_rate: float,
        eps: float,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        self.feed_forward = feed_forward
        self.norm = layer_norm(width, eps, dtype, param_dtype, rngs)
        self.residual, self.dropout_rate = residual, dropout_rate

    def finish(
        self,
        y: Float[Array, "B ... D"],
        h: Float[Array, "B ... D"],
        seeds: UInt32[Array, "B"] | None,
    ) -> Float[Array, "B ... D"]:
        """What follows the layer that mixes the sequence: `h` is its input, `y` its output."""
        y = dropout(y, self.dropout_rate, fold(seeds, 0))
        h = self.norm(y + h if self.residual else y)
        return h if self.feed_forward is None else self.feed_forward(h, fold(seeds, 1))


class Block(ResidualBlock):
    """A layer with the paper's time stream, or without time if it has no `mixer`."""

    def __init__(self, ssd: TimeAwareSSD, mixer: TimeMixer | None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ssd, self.mixer = ssd, mixer

    def __call__(
        self,
        h: Float[Array, "B L D"],
        tau: Float[Array, "B #H T"] | None,
        real: Bool[Array, "B 1 T"] | None,
        seeds: UInt32[Array, "B"] | None = None,
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
        self, h: Float[Array, "B L D"], tau: Float[Array, "B #H T"] | None
    ) -> Float[Array, "B H L L"]:
        """The time-aware mask of the layer, see `SequenceModel.masks`."""
        factor = None
        if self.mixer is not None and tau is not None:
            factor = self.mixer(tau, None, h.shape[1]).swapaxes(1, 2)
        return self.ssd.mask(h, factor)

    def last(
        self,
        h: Float[Array, "B L D"],
        tau: Float[Array, "B #H T"] | None,
        lengths: Int[Array, "B"],
        seeds: UInt32[Array, "B"] | None = None,
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


class CausalBlock(ResidualBlock):
    """A layer that the gaps modulate, or a layer without time if it has no `modulator`."""

    def __init__(self, ssd: CausalSSD, modulator: GapModulator | None, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ssd, self.modulator = ssd, modulator

    def __call__(
        self,
        h: Float[Array, "B L D"],
        features: Float[Array, "B L K"] | None,
        segment_ids: Int[Array, "B L"] | None,
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """One layer over rows of one or several histories.

        Args:
          h: item stream.
          features: `gap_features` of the gaps; None without a `modulator`.
          segment_ids: the number of the history that each position belongs to; None: each row is
            one history.
          seeds: dropout seeds of the rows; None switches dropout off.
        """
        return self.finish(self.ssd(h, self._time(features), segment_ids), h, seeds)

    def init_state(self, batch: int) -> LayerState:
        """The state before the first event."""
        return self.ssd.init_state(batch)

    def mask(
        self, h: Float[Array, "B L D"], features: Float[Array, "B L K"] | None
    ) -> Float[Array, "B H L L"]:
        """The time-aware mask of the layer, see `SequenceModel.masks`."""
        return self.ssd.mask(h, self._time(features))

    def last(
        self,
        h: Float[Array, "B L D"],
        features: Float[Array, "B L K"] | None,
        lengths: Int[Array, "B"],
        seeds: UInt32[Array, "B"] | None = None,
    ) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history, for a model's last layer."""
        y = self.ssd.last(h, self._time(features), lengths)
        return self.finish(y, take_position(h, lengths - 1), seeds)

    def step(
        self, state: LayerState, h: Float[Array, "B D"], features: Float[Array, "B K"] | None
    ) -> tuple[LayerState, Float[Array, "B D"]]:
        """`__call__` for one more event of each user."""
        state, y = self.ssd.step(state, h, self._time(features))
        return state, self.finish(y, h, None)

    def _time(self, features):
        return None if self.modulator is None else self.modulator(features)
