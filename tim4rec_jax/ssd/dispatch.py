"""Choice of an implementation: by name, or the best for the platform that is compiled for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Target(NamedTuple):
    """What programs are compiled for.

    Attributes:
        platform: "cpu", "gpu" or "tpu", as `jax.default_backend` names it.
        compute_capability: of an NVIDIA GPU that need not be in this machine, 90 for an H100;
            None where the platform's own device tells.
    """

    platform: str
    compute_capability: int | None = None


_context = jax.make_user_context()


def compile_for(
    platform: str, compute_capability: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Within it, programs are traced as they would be on another platform.

    That is how they are lowered or compiled ahead of time: implementations are chosen, and
    refused, for that platform. Arrays still live, and calls still run, on the platform at hand.

    Args:
        platform: "cpu", "gpu" or "tpu".
        compute_capability: of an NVIDIA GPU, 90 for an H100.

    Returns:
        A context manager.
    """
    return _context(Target(platform, compute_capability))


def target() -> Target:
    """Returns what is compiled for: the nearest `compile_for`, else the default backend."""
    return _context.value or Target(jax.default_backend())


class Implementation(NamedTuple):
    """One way to compute an operator.

    Attributes:
        compute: the operator as a function of its arguments, one tuple.
        platform: the only platform it runs on, where it is preferred; None: all.
        obstacle: says of the same arguments, arrays or their shapes, what keeps it from
            running on its platform; None: nothing.
    """

    compute: Callable[[Any], Any]
    platform: str | None = None
    obstacle: Callable[[Any], str | None] = lambda arguments: None


def choose(
    implementations: Mapping[str, Implementation],
    name: str | None,
    arguments: Any,
    otherwise: str = "xla",
) -> Implementation:
    """Returns the implementation of a name, or for None the best that can run.

    Args:
        implementations: by name.
        name: which, or None.
        arguments: of the operator.
        otherwise: the name of what runs anywhere, where none of the platform's own can.

    Raises:
        ValueError: there is none of that name, or it cannot run.
    """
    platform = target().platform
    if name is None:
        for implementation in implementations.values():
            if implementation.platform == platform and not implementation.obstacle(arguments):
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
    if reason := implementation.obstacle(arguments):
        raise ValueError(f"implementation {name!r} cannot run: {reason}")
    return implementation
