"""Low and high frequencies of a history, without looking ahead."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tim4rec_jax.layers.checks import check_sizes
from tim4rec_jax.ssd.segments import first_positions


class BandsState(NamedTuple):
    """What the moving average keeps of the past."""

    total: Float[Array, "B D"]  # weighted sum of the inputs
    weight: Float[Array, " B"]  # sum of their weights


class FrequencyBands(nnx.Module):
    """a * low + b * (h - low), with a number for each channel in a and b.

    low[t] is the mean of h[s] over s <= t with the weights exp(-(t - s) / events). BSARec
    (arXiv 2312.10325) splits a row by a Fourier transform, where each position sees what follows
    it. Here none does, so rows can hold several histories, and a history can go on event by event.
    a and b start at zero, so an untrained layer gives zeros.

    Attributes:
      weights: a and b [2,D].
    """

    def __init__(self, width: int, events: int | float, *, param_dtype: Any = jnp.float32):
        """Makes the weights.

        Args:
          width: D, of inputs and outputs.
          events: after so many events, the weight of an event has fallen by a factor of e.
          param_dtype: of the weights.

        Raises:
          ValueError: `width` is not positive.
        """
        check_sizes(width=width)
        self.weights = nnx.Param(jnp.zeros((2, width), param_dtype))
        self.events = events

    def __call__(
        self, h: Float[Array, "B L D"], segment_ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """All positions; a mean begins anew where a segment begins."""
        index = jnp.arange(h.shape[1])
        first = jnp.zeros_like(index)[None] if segment_ids is None else first_positions(segment_ids)
        seen = (index <= index[:, None]) & (index >= first[..., None])  # [B or 1,L,L]
        weights = jnp.where(seen, self._fallen(index[:, None] - index), 0.0)
        weights = weights / weights.sum(-1, keepdims=True)
        weights = jnp.broadcast_to(weights, (h.shape[0], *weights.shape[1:]))
        return self._weigh(jnp.matmul(weights.astype(h.dtype), h), h)

    def last(self, h: Float[Array, "B L D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
        """`__call__` at position `lengths - 1` of rows of one history each."""
        before = lengths[:, None] - 1 - jnp.arange(h.shape[1])
        weights = jnp.where(before >= 0, self._fallen(before), 0.0)
        weights = (weights / weights.sum(-1, keepdims=True)).astype(h.dtype)
        # Behind the history may stand anything.
        h = jnp.where((before >= 0)[..., None], h, 0)
        at_end = jnp.sum(jnp.where((before == 0)[..., None], h, 0), axis=1)
        return self._weigh(jnp.einsum("bl,bld->bd", weights, h), at_end)

    def init_state(self, batch: int) -> BandsState:
        """The state of `batch` rows before their first position."""
        dtype = self.weights.dtype
        return BandsState(
            jnp.zeros((batch, self.weights.shape[1]), dtype), jnp.zeros((batch,), dtype)
        )

    def step(
        self, state: BandsState, h: Float[Array, "B D"]
    ) -> tuple[BandsState, Float[Array, "B D"]]:
        """`__call__` for one more position of each row."""
        kept = self._fallen(1)
        total, weight = kept * state.total + h.astype(state.total.dtype), kept * state.weight + 1
        low = (total / weight[:, None]).astype(h.dtype)
        return BandsState(total, weight), self._weigh(low, h)

    def _fallen(self, distance):
        """The weight of an event `distance` events ago; negative distances count as 0."""
        return jnp.exp(-jnp.maximum(distance, 0) / self.events).astype(self.weights.dtype)

    def _weigh(self, low, h):
        of_low, of_high = self.weights[...].astype(h.dtype)
        return of_low * low + of_high * (h - low)
