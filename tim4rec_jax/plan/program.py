"""Counts what a program computes, moves and holds, without compiling it.

A program is a jaxpr, the list of operations that `jax.make_jaxpr` traces. A compiler fuses
operations on single elements into those around them, so that most of their results never reach the
memory. Three rules stand for that:

- Results of matrix products, sums, scatters and so on are stored. So are results on single elements
  that such an operation reads.
- A result on single elements that several operations read is computed once and *held*. The memory
  counts it.
- It is cheaper to compute such a result again in each operation than to *read* it, unless it has an
  expensive function in it, such as a logarithm. The traffic counts what is read under this rule.

Of several branches the largest counts. Bodies of loops count once, as the compiler counts them,
unless the number of their turns is told.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations on single elements, and those that only change the shape. XLA fuses all of them.
_FUSED = _words(
    """
    abs add add_any and atan2 bitcast_convert_type broadcast_in_dim cbrt ceil clamp concatenate
    convert_element_type copy cos div dynamic_slice eq erf erf_inv exp exp2 expand_dims expm1
    floor ge gt imag integer_pow iota is_finite le log log1p logistic lt max min mul ne neg
    nextafter not or pad pow pvary real reduce_precision rem reshape rev round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin slice sqrt square squeeze
    stop_gradient sub tan tanh transpose xor
    """
)
_EXPENSIVE = _words("cbrt cos div erf exp expm1 log log1p logistic pow rem rsqrt sin sqrt")
_SHAPES = _words("broadcast_in_dim convert_element_type expand_dims iota reshape squeeze")
# XLA counts these by themselves and not among the floating-point operations.
_NO_OPERATIONS = _words(
    """
    bitcast_convert_type broadcast_in_dim concatenate copy cos dynamic_slice erf erf_inv exp
    exp2 expand_dims expm1 iota log log1p logistic pad pow reshape rev rsqrt sin slice sqrt
    squeeze stop_gradient tanh transpose
    """
)
_CALLS = {"custom_vjp_call_jaxpr": "fun_jaxpr"}
_CALLS |= dict.fromkeys(
    ("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"
)
_CALLS |= dict.fromkeys(("pjit", "jit", "remat2", "checkpoint", "custom_lin"), "jaxpr")
_LOOPS = {"while": "body_jaxpr", "scan": "jaxpr"}
# Their result takes the place of an argument of the same size that nothing else reads.
_IN_PLACE = ("while", "scan", "dynamic_update_slice", "scatter", "scatter-add", "add_any")


# How often compilers do the same operation on single elements, at most.
_AGAIN = 3


class Cost(NamedTuple):
    """What a program takes.

    Attributes:
      operations: floating-point operations, as the compiler counts them.
      traffic: bytes read from and written to memory.
      memory: most bytes held at once besides arguments and results.
    """

    operations: int | float
    traffic: int | float
    memory: int | float


def cost(function: Any, *arguments: Any, turns: int | None = None) -> Cost:
    """The cost of a function of arrays, or of shapes in their places.

    Args:
      function: can be traced by JAX.
      *arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      turns: how often a `while` loop turns, whose number of turns depends on the data. A `scan`
        then counts as often as it is long. None: each body counts once.
    """
    return _cost(jax.make_jaxpr(function)(*arguments).jaxpr, turns)


class _Step(NamedTuple):
    """An operation whose values have numbers; an argument is None where it is a constant."""

    name: str
    arguments: list[int | None]
    results: list[int]
    shapes: list[Any]
    parameters: dict[str, Any]


class _Program:
    """A jaxpr without calls inside, and without what has no influence on its results."""

    def __init__(self, jaxpr: Any):
        self.shapes: list[Any] = []
        self.steps: list[_Step] = []
        self.arguments = [self._new(v.aval) for v in jaxpr.invars]
        self.results = {v for v in self._inline(jaxpr, self.arguments) if v is not None}
        needed, steps = set(self.results), []
        for step in reversed(self.steps):
            if needed.intersection(step.results):
                steps.append(step)
                needed.update(v for v in step.arguments if v is not None)
        self.steps = steps[::-1]

    def size(self, value: int) -> int:
        """Bytes of a value; random keys count as two words."""
        shape = self.shapes[value]
        width = 8 if jnp.issubdtype(shape.dtype, jax.dtypes.extended) else shape.dtype.itemsize
        return math.prod(shape.shape) * width

    def _new(self, shape: Any) -> int:
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _inline(self, jaxpr: Any, arguments: Sequence[int | None]) -> list[int | None]:
        known: dict[Any, int] = {}
        for variable, value in zip(jaxpr.invars, arguments, strict=True):
            known[variable] = self._new(variable.aval) if value is None else value
        known |= {variable: self._new(variable.aval) for variable in jaxpr.constvars}

        def read(variable: Any) -> int | None:
            return None if isinstance(variable, Literal) else known[variable]

        for equation in jaxpr.eqns:
            name, inputs = equation.primitive.name, [read(v) for v in equation.invars]
            if name in _CALLS:
                results = self._inline(_open(equation.params[_CALLS[name]]), inputs)
                results = [
                    self._new(v.aval) if result is None else result
                    for v, result in zip(equation.outvars, results, strict=True)
                ]
            else:
                results = [self._new(v.aval) for v in equation.outvars]
                shapes = [v.aval for v in equation.invars]
                self.steps.append(_Step(name, inputs, results, shapes, equation.params))
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(variable) for variable in jaxpr.outvars]


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _cost(jaxpr: Any, turns: int | None) -> Cost:
    program = _Program(jaxpr)
    inner = [_inner(step, turns) for step in program.steps]
    read, held = (_stored(program, rule) for rule in ("read", "held"))
    operations, traffic = _work(program, read)
    return Cost(
        operations + sum(cost.operations for cost in inner),
        traffic + sum(cost.traffic for cost in inner),
        _most_held(program, held, [cost.memory for cost in inner]),
    )


def _inner(step: _Step, turns: int | None) -> Cost:
    """The cost of a loop, or of the largest branch."""
    if step.name == "cond":
        costs = [_cost(_open(branch), turns) for branch in step.parameters["branches"]]
        return Cost(*map(max, zip(*costs, strict=True)))
    if step.name not in _LOOPS:
        return Cost(0, 0, 0)
    one = _cost(_open(step.parameters[_LOOPS[step.name]]), turns)
    count = 1 if turns is None else step.parameters.get("length", turns)
    return Cost(count * one.operations, count * one.traffic, one.memory)


def _stored(program: _Program, rule: str) -> set[int]:
    """The values that are in memory under one of the rules "read" and "held"."""
    readers: dict[int, list[str]] = defaultdict(list)
    for step in program.steps:
        for value in step.arguments:
            if value is not None:
                readers[value].append(step.name)
    stored = {*program.arguments, *program.results}
    for step in program.steps:
        for value in step.results:
            names = readers[value]
            if step.name == "transpose":  # a matrix product reads its arguments in any order
                names = [name for name in names if name != "dot_general"]
            shared = len(names) > 1 and (
                step.name not in _SHAPES if rule == "held" else step.name in _EXPENSIVE
            )
            if step.name not in _FUSED or shared or any(_needs_memory(name) for name in names):
                stored.add(value)
    return stored


def _needs_memory(name: str) -> bool:
    return name not in _FUSED and not name.startswith(("reduce_", "arg"))


def _work(program: _Program, stored: set[int]) -> tuple[int | float, int | float]:
    """Floating-point operations, and bytes read and written."""
    roots: dict[int, frozenset[int]] = {value: frozenset((value,)) for value in stored}
    fused: dict[int, frozenset[int]] = defaultdict(frozenset)
    times: list[int] = [0] * len(program.steps)
    traffic = 0.0
    for number, step in enumerate(program.steps):
        read = _roots(step, roots)
        inside = frozenset((number,)).union(*(fused[v] for v in step.arguments if v is not None))
        kept = [result for result in step.results if result in stored]
        if kept:
            traffic += _moved(program, step, kept, read)
            for other in inside:
                times[other] += 1
        else:
            roots |= dict.fromkeys(step.results, read)
            fused |= dict.fromkeys(step.results, inside)
    operations = sum(
        min(count, _AGAIN) * _operations(step, program.shapes[result])
        for step, count in zip(program.steps, times, strict=True)
        for result in step.results
    )
    return operations, traffic


def _moved(program: _Program, step: _Step, kept: list[int], read: frozenset[int]) -> int | float:
    """Bytes that a step reads and writes. Of a table it touches only the rows it looks up."""
    sizes = [math.prod(shape.shape) * 4 for shape in step.shapes]
    if step.name == "gather":
        return 2 * sum(map(program.size, kept)) + sizes[1]
    if step.name.startswith("scatter"):
        return 3 * sizes[2] + sizes[1]
    return sum(map(program.size, (*kept, *read)))


def _roots(step: _Step, roots: dict[int, frozenset[int]]) -> frozenset[int]:
    """The stored values from which a step computes."""
    known = (roots.get(value, frozenset((value,))) for value in step.arguments if value is not None)
    return frozenset().union(*known)


def _operations(step: _Step, result: Any) -> int | float:
    size = math.prod(result.shape)
    if step.name == "dot_general":
        (contracted, _), _ = step.parameters["dimension_numbers"]
        return 2 * size * math.prod(step.shapes[0].shape[axis] for axis in contracted)
    if step.name.startswith(("reduce_", "cum", "arg")):
        return math.prod(step.shapes[0].shape)
    return size if step.name in _FUSED - _NO_OPERATIONS else 0


def _most_held(program: _Program, stored: set[int], inner: list[Any]) -> int | float:
    """The most bytes at once, if each value goes after the last step that reads it."""
    roots: dict[int, frozenset[int]] = {value: frozenset((value,)) for value in stored}
    last: dict[int, int] = {}
    for number, step in enumerate(program.steps):
        read = _roots(step, roots)
        if any(result in stored for result in step.results):
            last |= dict.fromkeys(read, number)
        else:
            roots |= dict.fromkeys(step.results, read)
    stays = {*program.arguments, *program.results}
    # What a result is made from in place is part of it, unless that is an argument already.
    for number, step in reversed(list(enumerate(program.steps))):
        if step.name not in _FUSED and step.name not in _IN_PLACE:
            continue
        read = _roots(step, roots)
        for size in [program.size(value) for value in stays.intersection(step.results)]:
            places = [value for value in read if program.size(value) == size]
            if places and not stays.intersection(places) and last[places[0]] == number:
                stays.add(places[0])
    going: dict[int, set[int]] = defaultdict(set)
    for value, number in last.items():
        if value not in stays:
            going[number].add(value)
    held = most = 0.0
    for number, step in enumerate(program.steps):
        made = {value for value in step.results if value in stored} - stays
        freed = going[number]
        if step.name in _IN_PLACE:
            replaced = _replaced(program, step, freed)
            held -= sum(map(program.size, replaced))
            freed = freed - replaced
        held += sum(map(program.size, made))
        most = max(most, held + inner[number])
        held -= sum(map(program.size, freed | {value for value in made if value not in last}))
    return most


def _replaced(program: _Program, step: _Step, freed: Iterable[int]) -> set[int]:
    """The arguments that the results of a step overwrite."""
    left, replaced = list(freed), set()
    for result in step.results:
        for value in left:
            if program.size(value) == program.size(result):
                left.remove(value)
                replaced.add(value)
                break
    return replaced
