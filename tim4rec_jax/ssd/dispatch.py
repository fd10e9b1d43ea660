"""Choice of an implementation: by name, or the best for the platform that is compiled for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.export import is_symbolic_dim

from tim4rec_jax.runtime import target


class Implementation(NamedTuple):
    """One way to compute an operator.

    Attributes:
        compute: the operator as a function of its arguments, one named tuple.
        platform: the only platform it runs on, where it is preferred; None: it runs on all.
        unsupported_reason: a function of the same arguments, arrays or their shapes. It returns
            what keeps the implementation from running on its platform, or None.
    """

    compute: Callable[[Any], Any]
    platform: str | None = None
    unsupported_reason: Callable[[Any], str | None] = lambda arguments: None


def choose(
    implementations: Mapping[str, Implementation],
    name: str | None,
    arguments: Any,
    otherwise: str = "xla",
) -> Implementation:
    """Returns the implementation of a name, or for None the best that can run.

    Args:
        implementations: all there are, by name.
        name: the name of one, or None.
        arguments: the arguments of the operator.
        otherwise: the name of the one that None means where no implementation of the platform can
            run. It runs anywhere.

    Raises:
        ValueError: there is none of that name, or it cannot run.
    """
    platform = target().platform
    if name is None:
        for implementation in implementations.values():
            if implementation.platform == platform and not _reason(implementation, arguments):
                return implementation
        return implementations[otherwise]
    if name not in implementations:
        raise ValueError(
            f"there is no implementation {name!r}; "
            f"choose one of {', '.join(implementations)}, or None for the best"
        )
    implementation = implementations[name]
    if implementation.platform not in (None, platform):
        raise ValueError(
            f"implementation {name!r} runs on the platform {implementation.platform!r}, "
            f"and this is {platform!r}"
        )
    if reason := _reason(implementation, arguments):
        raise ValueError(f"implementation {name!r} cannot run: {reason}")
    return implementation


def _reason(implementation: Implementation, arguments) -> str | None:
    """Says what keeps the implementation from running on its platform, or None."""
    if implementation.platform is not None:
        shapes = (getattr(v, "shape", ()) for v in jax.tree.leaves(arguments))
        if any(is_symbolic_dim(size) for shape in shapes for size in shape):
            return "a kernel is made for one shape, and this one is symbolic"
    return implementation.unsupported_reason(arguments)
