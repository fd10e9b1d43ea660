"""What constructors of layers say of wrong arguments: one sentence that names the argument."""

import math
import operator
from collections.abc import Callable
from typing import Any

import jax

from tim4rec_jax.ssd.convolution import ACTIVATIONS

# What a feed-forward network may apply, by name.
FUNCTIONS = ACTIVATIONS | {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "tanh": jax.numpy.tanh}


def check_sizes(**sizes: Any) -> None:
    """Raises ValueError unless every argument is a whole number of 1 or more."""
    for name, value in sizes.items():
        try:
            fits = not isinstance(value, bool) and operator.index(value) >= 1
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")


def check_rate(name: str, value: Any) -> None:
    """Raises ValueError unless the argument is a probability in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def check_eps(value: Any) -> None:
    """Raises ValueError unless the `eps` of a norm is a finite number of 0 or more."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"eps must be a number of 0 or more, got {value!r}")


def check_divides(part: str, divisor: int, whole: str, number: int) -> None:
    """Raises ValueError unless one argument divides a number that other arguments make."""
    if number % divisor:
        raise ValueError(f"{part} must divide {whole} = {number}, got {divisor}")


def activation_name(value: Any, heads: int) -> str:
    """Returns the name of an activation that kernels have.

    Args:
      value: a name in `ACTIVATIONS`, its function, or None for what the published code takes.
      heads: H, which decides what None means.

    Raises:
      ValueError: the argument `activation` is none of these.
    """
    if value is None:
        return "hardswish" if heads % 8 else "silu"
    for name, function in ACTIVATIONS.items():
        if value is function or (isinstance(value, str) and value == name):
            return name
    names = " or ".join(repr(name) for name in ACTIVATIONS)
    raise ValueError(f"activation must be {names}, got {value!r}")


def activation_function(value: Any) -> Callable[[jax.Array], Any]:
    """Returns a function by its name, or the function that is given.

    Raises:
      ValueError: the argument `activation` is neither a known name nor a function.
    """
    if callable(value):
        return value
    if not isinstance(value, str) or value not in FUNCTIONS:
        raise ValueError(
            f"activation must be a function or one of {', '.join(FUNCTIONS)}, got {value!r}"
        )
    return FUNCTIONS[value]


def check_shape(name: str, array: Any, axes: str, size: int, lead: tuple | None = None) -> None:
    """Raises ValueError unless an array is [*axes,size], and its axes are `lead` where given."""
    shape = tuple(array.shape)
    if len(shape) != axes.count(",") + 2 or shape[-1] != size or lead not in (None, shape[:-1]):
        wanted = axes if lead is None else ",".join(map(str, lead))
        raise ValueError(f"{name} must be [{wanted},{size}], got shape {shape}")


def check_segments(segment_ids: Any, h: Any) -> None:
    """Raises ValueError unless there are none, or one integer for each position of `h`."""
    if segment_ids is None:
        return
    if tuple(segment_ids.shape) != tuple(h.shape[:2]):
        wanted = ",".join(map(str, h.shape[:2]))
        raise ValueError(f"segment_ids must be [{wanted}], got shape {tuple(segment_ids.shape)}")
    if not jax.numpy.issubdtype(segment_ids.dtype, jax.numpy.integer):
        raise ValueError(f"segment_ids must be whole numbers, got {segment_ids.dtype}")
