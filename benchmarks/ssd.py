"""Speed and memory of the SSD operator, each implementation and chunk size.

    python -m benchmarks.ssd [--tokens 3072] [--lengths 8 16 32 50 200 1024] [--repeats 20]
    python -m benchmarks.ssd [--repeats 20] [--plot roofline.png]       # on a GPU, see ssd_gpu.py

Heads, widths and states are those of the 64-d models (H = 4, P = N = 32, G = 1), float32. A call
sees `tokens` positions in all, about a micro-batch of training. Times are wall clock, smallest
and median; "processor" is the median of processor time, all threads together, which says more
than the clock where other programs run. Temporary memory is the compiler's figure.
"""

import argparse
import os
import time

# JAX leaves memory of a GPU to what it is compared with.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import block_gpu, ssd_gpu
from tim4rec_jax.ssd import ssd
from tim4rec_jax.ssd.shapes import BEAUTY, random_inputs
from tim4rec_jax.ssd.xla import default_chunk_size


def measure(function, inputs, repeats: int) -> tuple[float, float, float, float]:
    """Returns smallest and median wall time and median processor time in ms, and MiB."""
    program = jax.jit(function).lower(inputs).compile()
    jax.block_until_ready(program(inputs))
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        jax.block_until_ready(program(inputs))
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    memory = program.memory_analysis().temp_size_in_bytes / 2**20
    return min(wall) * 1e3, float(np.median(wall)) * 1e3, float(np.median(processor)) * 1e3, memory


def variants(length: int) -> list[tuple[str, int | None]]:
    """Returns implementations and chunk sizes worth comparing at a length."""
    sizes = {size for size in (16, 32, 64, 128) if size < length}
    sizes |= {default_chunk_size(length), *([length] if length <= 256 else [])}
    return [("reference", None), *(("xla", size) for size in sorted(sizes))]


def compare(batch: int, length: int, repeats: int) -> Table:
    """Returns a table of all variants at one shape."""
    table = Table("implementation", "chunk", "pass", title=f"B = {batch}, L = {length}")
    for column in ("min ms", "median ms", "processor ms", "tokens/s", "temporary MiB"):
        table.add_column(column, justify="right")
    inputs = random_inputs(BEAUTY._replace(batch=batch, length=length).op_inputs(), 0)
    for implementation, chunk_size in variants(length):

        def forward(inputs, implementation=implementation, chunk_size=chunk_size):
            return ssd(
                **inputs, dt_softplus=True, chunk_size=chunk_size, implementation=implementation
            )

        def both(inputs, forward=forward):
            return jax.grad(lambda inputs: jnp.sum(forward(inputs) ** 2))(inputs)

        chunk = "-" if chunk_size is None else str(chunk_size)
        chunk += " *" if chunk_size == default_chunk_size(length) else ""
        for name, function in (("forward", forward), ("with gradient", both)):
            least, median, processor, memory = measure(function, inputs, repeats)
            times = (f"{v:.2f}" for v in (least, median, processor))
            speed = f"{batch * length / least * 1e3:,.0f}"
            table.add_row(implementation, chunk, name, *times, speed, f"{memory:.1f}")
    return table


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ssd", description=__doc__)
    parser.add_argument("--tokens", type=int, default=3072, help="positions in a call")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 50, 200, 1024])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--plot", help="file for the roofline, on a GPU")
    flags = parser.parse_args()
    if jax.default_backend() == "gpu":
        ssd_gpu.run(flags)
        block_gpu.run(flags)
        return

    device = jax.devices()[0]
    console = Console(width=110)
    console.print(f"jax {jax.__version__}, {device.device_kind}, {os.cpu_count()} cores")
    for length in flags.lengths:
        console.print(compare(max(1, flags.tokens // length), length, flags.repeats))
    console.print("* chosen when chunk_size is None; tokens/s from the smallest time")


if __name__ == "__main__":
    main()
