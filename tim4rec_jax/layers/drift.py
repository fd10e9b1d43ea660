"""Taste that changes with the calendar: `model.drift_knots`."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

_DAY = 86_400.0
# A weight that Adam moves by its learning rate a step has to count within an epoch or two.
_UNIT = 5.0


class Drift(nnx.Module):
    """Adds a vector to hidden states that depends on the date alone.

    Its dot products with the item vectors are what each item's score is worth more or less on
    that date. The vector is linear between knots at equal distances, and beyond the first and
    the last one constant. All start at zero: an untrained model is one without.
    """

    def __init__(self, knots: int, dates: Sequence[int] | None, width: int, *, param_dtype):
        """Spreads the knots.

        Args:
          knots: how many, 2 or more.
          dates: of the first and of the last one, seconds since 1970; training takes those of the
            events it sees. None: not known yet.
          width: of hidden states.
          param_dtype: dtype of the vectors.
        """
        self.days = None if dates is None else tuple(date / _DAY for date in dates)
        self.vectors = nnx.Param(jnp.zeros((knots, width), param_dtype))

    def __call__(
        self, hidden: Float[Array, "*batch D"], dates: Float[Array, "*batch"]
    ) -> Float[Array, "*batch D"]:
        """Hidden states to score with on each of `dates`, days since 1970.

        Raises:
          ValueError: the dates of the knots are not known.
        """
        if self.days is None:
            raise ValueError("a model that drifts needs model.drift_dates, (first, last) seconds")
        first, last = self.days
        vectors = _UNIT * self.vectors[...]
        share = (dates - first) / max(last - first, 1 / _DAY)  # all events may have one time
        position = jnp.clip(share, 0.0, 1.0) * (len(vectors) - 1)
        near = jnp.maximum(1.0 - jnp.abs(position[..., None] - jnp.arange(len(vectors))), 0.0)
        return hidden + (near.astype(vectors.dtype) @ vectors).astype(hidden.dtype)
