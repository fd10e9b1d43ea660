"""What the TPU compiler says of the kernels and of the whole training step; no TPU needed.

    python -m benchmarks.tpu_compile [--topologies v5e:2x2 v6e:2x2] [--programs op block step chips]
                                     [--rows 2048] [--lengths 50] [--implementations xla tpu]

Needs libtpu, which `make test` puts into `.venv/tpu`: beside jax in the environment itself it
would print warnings in every program. Each program is compiled for one chip with the kernels
("tpu") and without ("xla"); "chips" is the training step (Beauty's settings) on four.

Columns: kernels in the program; temporary memory and arguments with results in MB a chip, as
the executable allots them; MB the compiler counts as moved, of kernels their arguments and
results; collective operations that move rows between chips, which are none where only sums of
gradients cross; seconds to compile.
"""

import argparse
import os
import re
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no machine with TPUs to ask about
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a compiler takes no chip from another process
}
sys.path.append(str(Path(__file__).parents[1] / ".venv" / "tpu"))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import beauty
from tim4rec_jax.models import build
from tim4rec_jax.ssd import (
    BLOCK_IMPLEMENTATIONS,
    IMPLEMENTATIONS,
    compile_for,
    ssd,
    time_aware_ssd_block,
)
from tim4rec_jax.training.state import init_state, make_optimizer
from tim4rec_jax.training.step import StepSettings, train_step

HEADS, WIDTH, STATE, N_ITEMS = 4, 32, 32, 12_101
INNER, MIXED = HEADS * WIDTH, HEADS * WIDTH + 2 * STATE


def array(*shape: int, dtype="float32") -> jax.ShapeDtypeStruct:
    """A shape to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype)


def op(rows: int, length: int, dtype):
    """The op as a function of rows and parameters, and their shapes."""
    inputs = {
        "x": array(rows, length, HEADS, WIDTH, dtype=dtype),
        "dt": array(rows, length, HEADS),
        "B": array(rows, length, 1, STATE, dtype=dtype),
        "C": array(rows, length, 1, STATE, dtype=dtype),
    }
    parameters = {name: array(HEADS) for name in ("A", "D", "dt_bias")}
    return lambda rows, shared: ssd(**rows, **shared, dt_softplus=True), inputs, parameters


def block(rows: int, length: int, dtype):
    """The same for the fused block."""
    inputs = {
        "projected": array(rows, length, INNER + MIXED + HEADS, dtype=dtype),
        "time_factor": array(rows, length, HEADS),
    }
    parameters = {name: array(HEADS) for name in ("A", "D", "dt_bias")}
    parameters |= {"conv_kernel": array(4, MIXED), "conv_bias": array(MIXED)}
    parameters |= {"norm_scale": array(INNER)}
    settings = {"activation": "hardswish", "state": STATE}
    return (
        lambda rows, shared: time_aware_ssd_block(**rows, **shared, **settings),
        inputs,
        parameters,
    )


def with_gradient(function):
    """The function's result and its gradient for every input."""

    def both(rows, shared):
        y, pull = jax.vjp(function, rows, shared)
        return y, pull(y)

    return both


def step(rows: int, dtype: str):
    """The training step as an object with `lower`, and the shapes of batch and state."""
    config = beauty.get_config()
    length = config.data.max_length
    config.model.dtype = dtype
    model = build(config.model, n_items=N_ITEMS, max_length=length)
    graphdef, params = nnx.split(model)
    tx = make_optimizer(config.train.learning_rate, 0.0)
    state = jax.eval_shape(lambda params: init_state(params, tx, 0), params)
    batch = {
        "items": array(rows, length, dtype="int32"),
        "lengths": array(rows, dtype="int32"),
        "gaps": array(rows, length),
        "targets": array(rows, dtype="int32"),
        "weights": array(rows),
    }
    settings = StepSettings(graphdef, tx, num_microbatches=1)
    return lambda batch, state: train_step.lower(state, batch, settings), batch, state


class Figures(NamedTuple):
    """What the compiler says, see above; memory in MB."""

    kernels: int
    temporary: float
    held: float
    moved: float
    exchanges: int
    seconds: float


def compiled(lower, rows, shared, devices, kernels: bool) -> Figures:
    """Compiles a program with its rows spread over devices."""
    mesh = Mesh(np.asarray(devices), ("batch",))

    def place(tree, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        shape = jax.ShapeDtypeStruct
        return jax.tree.map(lambda v: shape(v.shape, v.dtype, sharding=sharding), tree)

    jax.clear_caches()  # of what was traced with other implementations
    with ExitStack() as stack:
        stack.enter_context(compile_for("tpu"))
        if not kernels:
            for table in (IMPLEMENTATIONS, BLOCK_IMPLEMENTATIONS):
                stack.enter_context(mock.patch.dict(table))
                del table["tpu"]
        lowered = lower(place(rows, "batch"), place(shared))
    start = time.perf_counter()
    program = lowered.compile()
    seconds = time.perf_counter() - start
    memory, text = program.memory_analysis(), program.as_text()
    moved = program.cost_analysis()["bytes accessed"]
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    exchanged = re.findall(r" (all-gather|all-to-all|collective-permute)[-a-z]*\(", text)
    return Figures(
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        temporary=memory.temp_size_in_bytes / 1e6,
        held=held / 1e6,
        moved=moved / 1e6,
        exchanges=len(exchanged),
        seconds=seconds,
    )


def programs(names: list[str], rows: int, lengths: list[int]):
    """Yields (name, dtype, function that lowers, rows, parameters, chips)."""
    for dtype in ("float32", "bfloat16"):
        for name, make in (("op", op), ("block", block)):
            for length in lengths if name in names else ():
                function, *shapes = make(rows, length, jnp.dtype(dtype))
                for what, run in (("", function), (" + gradient", with_gradient(function))):
                    yield f"{name}, L {length}{what}", dtype, jax.jit(run).lower, *shapes, 1
        if "step" in names:
            yield "training step, L 50", dtype, *step(rows, dtype), 1
    if "chips" in names:
        yield "training step, L 50, 4 chips", "float32", *step(4 * rows, "float32"), 4


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu_compile", description=__doc__)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v6e:2x2"])
    parser.add_argument("--programs", nargs="+", default=["op", "block", "step", "chips"])
    parser.add_argument("--rows", type=int, default=2048, help="rows of a batch on one chip")
    parser.add_argument("--implementations", nargs="+", default=["xla", "tpu"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[50], help="of op and block")
    flags = parser.parse_args()

    for topology in flags.topologies:
        devices = topologies.get_topology_desc(topology, "tpu").devices
        print(f"jax {jax.__version__}, {devices[0].device_kind}, B = {flags.rows} a chip\n")
        print("| program | | | kernels | temporary | held | moved | exchanges | s |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for name, dtype, lower, rows, shared, chips in programs(
            flags.programs, flags.rows, flags.lengths
        ):
            for way in flags.implementations if chips == 1 else ("tpu",):
                figures = compiled(lower, rows, shared, devices[:chips], way == "tpu")
                line = [name, dtype, way]
                line += [f"{v:,.1f}" if isinstance(v, float) else str(v) for v in figures]
                print("|", " | ".join(line), "|", flush=True)


if __name__ == "__main__":
    main()
