"""Gradients written by hand that leave forward mode possible.

`jax.custom_vjp` has no forward mode. `jax.custom_jvp` has both modes, but its reverse mode is what
JAX makes of the forward one, which stores more and takes longer. `custom_gradient` here combines
them: JAX derives the forward mode, and the reverse mode is the function that is given.

It stands on a primitive for linear functions whose transpose is given. JAX's own one,
`jax.custom_derivatives.linear_call`, cannot be mapped by `jax.vmap` or differentiated again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def custom_gradient(
    forward: Callable[..., tuple[Any, Any]], backward: Callable[[Any, Any], tuple[Any, ...]]
) -> Callable[..., Any]:
    """Returns a function with a gradient of its own in reverse mode.

    Arguments are those of `jax.custom_vjp.defvjp`. In forward mode, and for the second derivative,
    JAX differentiates `forward` and `backward` themselves.

    Args:
        forward: computes from trees of arrays the result, and what `backward` needs besides.
        backward: computes the gradients of all arguments from what `forward` left and from the
            gradient of the result. Those of arguments that are not floating numbers are ignored.
    """

    def function(*arguments):
        return forward(*arguments)[0]

    call = jax.custom_jvp(functools.wraps(forward)(function))

    @call.defjvp
    def differentiate(arguments, changes):
        result, left = forward(*arguments)
        tree = jax.tree.structure(arguments)
        values, (left, left_tree) = jax.tree.leaves(arguments), jax.tree.flatten(left)
        moving = [jnp.issubdtype(jnp.result_type(v), jnp.inexact) for v in values]

        def push(*inputs):
            values, changes = inputs[: tree.num_leaves], iter(inputs[tree.num_leaves + len(left) :])
            changes = [
                next(changes) if moves else np.zeros(jnp.shape(v), jax.dtypes.float0)
                for v, moves in zip(values, moving, strict=True)
            ]
            both = (jax.tree.unflatten(tree, v) for v in (values, changes))
            return jax.tree.leaves(jax.jvp(function, *both)[1])

        def pull(*inputs):
            kept, gradients = inputs[tree.num_leaves :][: len(left)], inputs[tree.num_leaves :]
            gradients = jax.tree.unflatten(jax.tree.structure(result), gradients[len(left) :])
            found = backward(jax.tree.unflatten(left_tree, kept), gradients)
            found = tree.flatten_up_to(found)
            return [v for v, moves in zip(found, moving, strict=True) if moves]

        changes = [v for v, moves in zip(jax.tree.leaves(changes), moving, strict=True) if moves]
        kept = (*values, *left)
        change = _linear.bind(*kept, *changes, function=push, transpose=pull, constants=len(kept))
        return result, jax.tree.unflatten(jax.tree.structure(result), change)

    return call


# function(*constants, *arguments) is a list of arrays that is linear in the arguments. So is
# transpose(*constants, *gradients).
_linear = Primitive("linear_with_transpose")
_linear.multiple_results = True


def _evaluate(*inputs, function, transpose, constants):
    del transpose, constants
    return function(*inputs)


def _shapes(*inputs, function, transpose, constants):
    del transpose, constants
    return jax.make_jaxpr(function)(*inputs).out_avals


def _differentiate(inputs, changes, *, constants, function, **others):
    bind = functools.partial(_linear.bind, constants=constants, function=function, **others)
    results = bind(*inputs)
    if all(type(v) is ad.Zero for v in changes[:constants]):
        changes = [ad.instantiate_zeros(v) for v in changes[constants:]]
        return results, bind(*inputs[:constants], *changes)
    return results, jax.jvp(function, inputs, tuple(map(ad.instantiate_zeros, changes)))[1]


def _transpose(gradients, *inputs, constants, function, transpose):
    gradients = [ad.instantiate_zeros(v) for v in gradients]
    found = _linear.bind(
        *inputs[:constants],
        *gradients,
        constants=constants,
        function=transpose,
        transpose=function,
    )
    return [*[None] * constants, *found]


def _map(inputs, axes, *, constants, function, transpose):
    size = next(v.shape[a] for v, a in zip(inputs, axes, strict=True) if a is not None)
    inputs = [v if a is None else jnp.moveaxis(v, a, 0) for v, a in zip(inputs, axes, strict=True)]
    # Every linear argument is mapped, and so is every gradient.
    inputs[constants:] = [
        jnp.broadcast_to(v, (size, *v.shape)) if a is None else v
        for v, a in zip(inputs[constants:], axes[constants:], strict=True)
    ]
    mapped = [None if a is None else 0 for a in axes[:constants]]

    def over_rows(function):
        def call(*inputs):
            axes = (*mapped, *[0] * (len(inputs) - constants))
            return jax.vmap(function, axes)(*inputs)

        return call

    results = _linear.bind(
        *inputs,
        constants=constants,
        function=over_rows(function),
        transpose=over_rows(transpose),
    )
    return results, [0] * len(results)


_linear.def_impl(_evaluate)
_linear.def_abstract_eval(_shapes)
ad.primitive_jvps[_linear] = _differentiate
ad.primitive_transposes[_linear] = _transpose
batching.primitive_batchers[_linear] = _map
mlir.register_lowering(_linear, mlir.lower_fun(_evaluate, multiple_results=True))
