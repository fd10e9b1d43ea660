"""Inputs on which every implementation of the op is compared with the float64 recurrence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ssd.oracle import recurrence
from tim4rec_jax.ssd import IMPLEMENTATIONS, ssd
from tim4rec_jax.ssd.shapes import TRAINED

# What runs on every platform; what an interpreter runs here, without float64; and what of both is
# compared with the oracle.
ANYWHERE = [name for name, way in IMPLEMENTATIONS.items() if way.platform is None]
INTERPRETED = ["tpu", "triton"]
KERNELS = [*(name for name in ANYWHERE if name != "reference"), *INTERPRETED]
TOLERANCE = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-3}
# How far two float32 programs of one implementation may differ that add up in different orders
# (under vmap, remat, sharding). An addition has an error of at most u = 2^-24 of its result. Over n
# terms of random signs these errors are independent and add up to sqrt(n) u of the sum's norm. In
# what belongs to a position, at most n = 21 * 16 = 336 terms (positions and state) are added, and
# either program has its own error: 2 sqrt(336) u = 2.2e-6.
REORDERED = 2.2e-6
# The gradients of parameters are sums over all rows and positions as well. That of A is the worst
# of the op's: 168 terms whose magnitudes add up to 34 times the sum (`oracle.recurrence`). Partial
# sums of random signs grow with the square root, so adding up costs 34 u / sqrt(2) = 1.4e-6. The
# terms bring sqrt(336) u each, together sqrt(336) * 34 / sqrt(168) u = 2.9e-6. Both, for two
# programs: 4.5e-6. The bound is twice this estimate.
#
# Both bounds hold for the block as well. It adds 20 * 8 terms in the op, 4 in the convolution and
# 10 in the norm, together 174. Its worst gradient is that of dt_bias: 160 terms whose magnitudes
# add up to 38 times the sum, for which the estimate is 4.0e-6.
REORDERED_OVER_ROWS = 9e-6
PARAMETERS = {"A", "D", "dt_bias", "conv_kernel", "conv_bias", "norm_scale"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape and set of options."""

    name: str
    length: int
    heads: int = 2
    groups: int = 1
    width: int = 5
    size: int = 3
    chunk_size: int | None = None
    decay: float | None = None  # largest |A dt|, dt given as it is; None: through softplus
    still: bool = False  # dt = 0 at every other position
    segments: bool = False
    initial_state: bool = True
    skip_per_channel: bool = False
    dt_limit: tuple[float, float] = (0.0, float("inf"))


LENGTHS = [Case(f"L{length}", length) for length in (1, 2, 31, 50, 63, 64, 65, 200, 257, 1024)]
GROUPS = Case("groups", 37, heads=4, groups=2, chunk_size=16, segments=True, skip_per_channel=True)
STRONG_DECAY = Case("strong decay", 65, chunk_size=16, decay=80.0, still=True, segments=True)
STRONG_DECAY_IN_64 = Case("strong decay in chunks of 64", 65, chunk_size=64, decay=80.0, still=True)
# One chunk without an initial state is a way of its own in every implementation.
ONE_CHUNK = Case("one chunk", 20, initial_state=False, segments=True)
CHUNKS_OF_ONE = Case("chunks of one", 7, chunk_size=1, initial_state=False, dt_limit=(0.4, 0.9))
SLOW_OPTIONS = [
    Case("segments in one chunk", 31, segments=True),
    Case("strong decay in one chunk", 64, decay=80.0),
]
FURTHER_OPTIONS = [
    Case("P = N", 24, heads=1, width=8, size=8, chunk_size=8),
    Case("no initial state", 33, chunk_size=16, initial_state=False),
    Case("one chunk and no initial state", 20, initial_state=False),
    Case("dt = 0", 40, chunk_size=16, decay=2.0, still=True),
    Case("dt limits", 30, chunk_size=8, dt_limit=(0.4, 0.9)),
    Case("chunks of one with a state", 7, chunk_size=1),
]
# The heads and states that the released models have.
TRAINED_CASES = [
    Case(s.name, s.length, heads=s.heads, width=s.width, size=s.state, chunk_size=32)
    for s in TRAINED
]


def for_triton(case: Case) -> Case:
    """Returns the case in sizes that Triton's kernels have."""
    return dataclasses.replace(case, width=16, size=32)


TRITON = [
    for_triton(GROUPS),
    for_triton(STRONG_DECAY),
    *TRAINED_CASES,
    Case("wide heads", 20, groups=2, width=128, size=64, segments=True),
    for_triton(Case("one chunk, no initial state", 20, initial_state=False)),
    for_triton(Case("dt limits", 30, chunk_size=16, dt_limit=(0.4, 0.9))),
]
TRITON_BFLOAT16 = Case("D by channel", 20, heads=1, width=64, size=16, skip_per_channel=True)
TRITON_SLOW = [
    *map(for_triton, LENGTHS[:-1] + SLOW_OPTIONS),
    Case("L1024", 1024, heads=1, width=16, size=16),
    Case("P > N", 40, heads=1, width=64, size=16, chunk_size=16),
    for_triton(Case("no initial state", 33, chunk_size=16, initial_state=False)),
    for_triton(Case("dt = 0", 40, chunk_size=16, decay=2.0, still=True)),
    Case("as trained, L200", 200, heads=4, width=32, size=32),
]

slow = pytest.mark.slow


def runs(implementation, dtype, fast, heavy=()):
    """Returns (implementation, case, dtype) for each case; the heavy ones are slow tests."""
    return [
        *((implementation, case, dtype) for case in fast),
        *(pytest.param(implementation, case, dtype, marks=slow) for case in heavy),
    ]


# One length of each kind is fast: one position, one chunk, whole and ragged chunks.
FAST_LENGTHS = [case for case in LENGTHS if case.length in (1, 50, 65)]
SLOW_LENGTHS = [case for case in LENGTHS if case not in FAST_LENGTHS]
OPTIONS = [GROUPS, STRONG_DECAY, *SLOW_OPTIONS]
RUNS = [
    *runs("reference", "float64", [GROUPS], [STRONG_DECAY, *FURTHER_OPTIONS]),
    *runs("xla", "float32", [*FAST_LENGTHS, GROUPS, STRONG_DECAY_IN_64]),
    *runs("xla", "float32", [], [*SLOW_LENGTHS, *OPTIONS[1:], *FURTHER_OPTIONS, *TRAINED_CASES]),
    *runs("xla", "float64", [ONE_CHUNK, CHUNKS_OF_ONE], [*OPTIONS, *FURTHER_OPTIONS]),
    *runs("xla", "bfloat16", [GROUPS], OPTIONS[1:]),
    # Lengths in between are whole chunks or ragged ones like these.
    *runs("tpu", "float32", [GROUPS, STRONG_DECAY, ONE_CHUNK]),
    *runs("tpu", "float32", [], [LENGTHS[0], LENGTHS[3], *LENGTHS[-2:], *SLOW_OPTIONS]),
    *runs("tpu", "float32", [], [FURTHER_OPTIONS[2]]),
    *runs("tpu", "bfloat16", [ONE_CHUNK], [STRONG_DECAY]),
    *runs("triton", "float32", TRITON, TRITON_SLOW),
    *runs("triton", "bfloat16", [TRITON_BFLOAT16]),
    *runs("triton", "bfloat16", [], [*map(for_triton, OPTIONS[:2]), *TRAINED_CASES]),
]


def make(case: Case, batch: int = 2) -> tuple[dict, list, dict]:
    """Returns float64 inputs, weights of the outputs in an objective, and other arguments."""
    rng = np.random.default_rng(case.length)
    lead, heads = (batch, case.length), case.heads
    state = (batch, heads, case.width, case.size)
    inputs = {
        "x": rng.normal(size=(*lead, heads, case.width)),
        "dt": rng.normal(size=(*lead, heads)),
        "A": -rng.uniform(0.5, 2, heads),
        "B": rng.normal(size=(*lead, case.groups, case.size)),
        "C": rng.normal(size=(*lead, case.groups, case.size)),
        "D": rng.normal(size=(heads, case.width) if case.skip_per_channel else heads),
    }
    options = {"chunk_size": case.chunk_size, "dt_limit": case.dt_limit}
    if case.decay is None:
        inputs["dt_bias"] = rng.normal(size=heads)
        options["dt_softplus"] = True
    else:
        # All orders of magnitude up to the largest: one row holds harmless and lethal steps.
        inputs["dt"] = case.decay / 2 * 10.0 ** rng.uniform(-4, 0, (*lead, heads))
    if case.still:
        inputs["dt"][:, ::2] = 0
    if case.initial_state:
        inputs["initial_state"] = rng.normal(size=state)
    if case.segments:
        options["segment_ids"] = jax.device_put(np.cumsum(rng.random(lead) < 0.15, axis=1))
    weights = [rng.normal(size=inputs["x"].shape), rng.normal(size=state)]
    return inputs, weights, options


def outcome(inputs: dict, weights: list, *, remat: bool = False, **options) -> dict:
    """Returns `y`, the final state, and the gradient of their weighted sum for every input."""

    def op(inputs):
        return ssd(**inputs, return_final_state=True, **options)

    def objective(inputs):
        results = (jax.checkpoint(op) if remat else op)(inputs)
        return sum(jnp.sum(r * w) for r, w in zip(results, weights, strict=True)), results

    gradients, (y, final_state) = jax.grad(objective, has_aux=True)(inputs)
    return {"y": y, "final_state": final_state, **gradients}


# Optimising takes most of the time of compiling, and the suite goes without; runs that ask
# whether optimised code is right as well say so.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
STATIC = ("implementation", "chunk_size", "dt_softplus", "dt_limit")
FULL = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
optimised = jax.jit(outcome, static_argnames=STATIC, compiler_options=FULL)
quick = jax.jit(outcome, static_argnames=STATIC, compiler_options=QUICK)


def to_dtype(tree, dtype):
    """Returns the arrays of a tree in another dtype."""
    # By numpy: JAX would compile a program for every shape.
    return jax.tree.map(lambda v: jax.device_put(np.asarray(v).astype(jnp.dtype(dtype))), tree)


def exact(inputs: dict, weights: list, **options) -> dict:
    """Returns the outcome in float64, by the oracle."""
    return recurrence(inputs, weights, **options)[0]


def assert_close(got: dict, wanted: dict, tolerance: float) -> None:
    """Asserts that the norm of each difference is a small part of the wanted array's."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        value, result = (np.asarray(v, np.float64) for v in (value, got[name]))
        error, scale = np.linalg.norm(result - value), np.linalg.norm(value)
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"


def assert_same(got: dict, wanted: dict) -> None:
    """Asserts that two arrangements of one implementation differ by the order of sums at most."""
    assert got.keys() == wanted.keys()
    for names, bound in (
        (wanted.keys() - PARAMETERS, REORDERED),
        (wanted.keys() & PARAMETERS, REORDERED_OVER_ROWS),
    ):
        assert_close({n: got[n] for n in names}, {n: wanted[n] for n in names}, bound)
