"""The SSD operator on a GPU: our kernels, XLA, mamba_ssm's Triton pipeline and a plain copy.

Called by `python -m benchmarks.ssd` where JAX finds a GPU. Every figure is the median over
repeats of the time of one call, taken from programs of `CALLS` calls on as many sets of inputs:
a single call is over before the host has started the next, and one set would stay in the cache.
"copy" is the time that a copy on the device takes to read and write as many bytes as the op has
to: each input once, each output once, for the gradient those of both passes.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from tim4rec_jax.ssd import finite_inputs, ssd
from tim4rec_jax.ssd.shapes import OP_SHAPES, Shape, random_inputs

CALLS = 8
_STARTED = 4  # runs before any is waited for


def input_sets(inputs: dict[str, jax.ShapeDtypeStruct]) -> list[dict[str, jax.Array]]:
    """Returns a set of inputs for each call: the same random numbers, in arrays of their own."""
    first = random_inputs(inputs, 0)
    return [jax.tree.map(jnp.copy, first) for _ in range(CALLS)]


def median_time(run: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    """Returns the median time of `run` in seconds.

    Several runs are started before any is waited for, so that the host starts one while the device
    computes the one before.
    """
    wait(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(_STARTED):
            last = run()
        wait(last)
        times.append((time.perf_counter() - start) / _STARTED)
    return statistics.median(times)


def time_program(function: Callable[[Any], Any], sets: list, repeats: int) -> float:
    """Times a function on `CALLS` sets of inputs, all in one program."""
    with finite_inputs():  # as in models: else XLA looks for NaN in all of them
        program = jax.jit(lambda sets: [function(one) for one in sets]).lower(sets).compile()
    return median_time(lambda: program(sets), jax.block_until_ready, repeats) / CALLS


def time_op(sets: list, repeats: int, gradient: bool, **options) -> float:
    """Times `ssd`, or `ssd` and its gradient."""

    def forward(one):
        return ssd(**one, dt_softplus=True, **options)

    def both(one):
        y, pull = jax.vjp(forward, one)
        return y, pull(one["x"])

    return time_program(both if gradient else forward, sets, repeats)


def time_mamba(shape: Shape, sets: list, repeats: int, gradient: bool) -> float | None:
    """Times mamba_ssm's pipeline in PyTorch; None where it cannot be imported."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from mamba_ssm.ops.triton.ssd_combined import (  # pyright: ignore[reportMissingImports]
            mamba_chunk_scan_combined,
        )
    except ImportError:
        return None
    dtype = getattr(torch, shape.dtype)
    tensors = [
        {
            k: torch.tensor(
                np.asarray(v, np.float32),
                device="cuda",
                dtype=dtype if k in ("x", "B", "C") else None,
            )
            for k, v in one.items()
        }
        for one in sets
    ]

    def run():
        for one in tensors:
            leaves = {k: v.detach().requires_grad_(gradient) for k, v in one.items()}
            # Its own default length of a chunk, and no more than the sequence.
            y = mamba_chunk_scan_combined(
                **leaves, chunk_size=min(256, max(16, shape.length)), dt_softplus=True
            )
            if gradient:
                y.backward(one["x"])

    return median_time(run, lambda _: torch.cuda.synchronize(), repeats) / CALLS


def time_copy(size: int, repeats: int) -> float:
    """Times reading and writing `size` bytes in all."""
    arrays = [jnp.full(size // 8, float(i)) for i in range(CALLS)]
    return time_program(lambda a: -a, arrays, repeats)


def measure(shape: Shape, repeats: int) -> list[dict]:
    """Returns the seconds of everything that is compared, for both passes."""
    sets = input_sets(shape.op_inputs())
    rows = []
    for gradient in (False, True):
        row = {
            "triton": time_op(sets, repeats, gradient, implementation="triton"),
            "xla": time_op(sets, repeats, gradient, implementation="xla"),
            "mamba_ssm": time_mamba(shape, sets, repeats, gradient),
            "copy": time_copy(shape.op_bytes(gradient), repeats),
        }
        if shape.dtype == "float32":
            tf32 = {"implementation": "triton", "precision": "tf32"}
            row["triton tf32"] = time_op(sets, repeats, gradient, **tf32)
        rows.append({"shape": shape, "gradient": gradient, "seconds": row})
    return rows


def product_speed(precision: str, repeats: int, size: int = 2048) -> float:
    """Returns operations a second of large matrix products of float32, with `jax` precision."""
    sets = [jnp.full((size, size), float(i)) for i in range(CALLS)]
    seconds = time_program(lambda a: jnp.dot(a, a, precision=precision), sets, repeats)
    return 2 * size**3 / seconds


def plot(rows: list[dict], path: str, repeats: int) -> None:
    """Draws operations a second over operations a byte, under the roofs: copies and products."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    for colour, name in enumerate(("triton", "triton tf32", "xla", "mamba_ssm")):
        for gradient, marker in ((False, "o"), (True, "^")):
            points = [
                (
                    shape.op_operations(gradient) / shape.op_bytes(gradient),
                    shape.op_operations(gradient) / time,
                )
                for row in rows
                if row["gradient"] == gradient and (time := row["seconds"].get(name))
                for shape in [row["shape"]]
            ]
            if points:
                x, speeds = np.transpose(points)
                label = f"{name}, with gradient" if gradient else name
                axes.scatter(x, speeds / 1e12, c=f"C{colour}", marker=marker, label=label)
    moved = max(r["shape"].op_bytes(r["gradient"]) / r["seconds"]["copy"] for r in rows)
    intensity = np.geomspace(1, 1000)
    for precision, style in (("float32", "-"), ("tensorfloat32", "--")):
        most = product_speed(precision, repeats)
        label = f"copy {moved / 1e12:.3g} TB/s, {precision} products {most / 1e12:.3g} T/s"
        roof = np.minimum(intensity * moved, most) / 1e12
        axes.plot(intensity, roof, style, color="black", linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="Tera-operations / s")
    axes.set_title(f"The SSD on {jax.devices()[0].device_kind}")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def run(flags: argparse.Namespace) -> None:
    """Measures all cases and prints a table as it grows."""
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    names = ("triton", "triton tf32", "xla", "mamba_ssm", "copy")
    rows = []
    for shape in OP_SHAPES:
        rows += measure(shape, flags.repeats)
        table = Table("pass", *(f"{name} us" for name in names), "GB/s", "triton / copy")
        table.title = f"{shape.name}: B {shape.batch}, L {shape.length}, P {shape.width}"
        for row in rows[-2:]:
            seconds = row["seconds"]
            times = [f"{v * 1e6:.1f}" if (v := seconds.get(name)) else "-" for name in names]
            moved = shape.op_bytes(row["gradient"]) / seconds["triton"] / 1e9
            ratio = seconds["triton"] / seconds["copy"]
            label = "with gradient" if row["gradient"] else "forward"
            table.add_row(label, *times, f"{moved:.0f}", f"{ratio:.2f}")
        console.print(table)
    if flags.plot:
        plot(rows, flags.plot, flags.repeats)
