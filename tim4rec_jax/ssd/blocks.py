"""Sizes of the blocks that the Triton kernels work in, by device and shape."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

# Rows of a GPU are written by `python -m benchmarks.tune_triton` when it runs there. None have been
# yet: those in it were chosen by what the compiler reports, few registers spilled and few
# instructions (`python -m benchmarks.triton_compile`).
TABLE = Path(__file__).with_name("blocks.json")


class Blocks(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        chunk: positions that are computed at once, a power of two.
        heads: heads of a program, all of one group; programs of the block take all there are.
        warps: warps of a program.
        stages: loads that the compiler keeps under way.
    """

    chunk: int
    heads: int
    warps: int
    stages: int


def key(kernel: str, capability: int | None, one_chunk: bool, size: int, precision: str) -> str:
    """Returns the name of a row of the table, as for `blocks`; None: of a GPU not measured."""
    return f"{kernel} {capability} {'one' if one_chunk else 'many'} {max(size, 32)} {precision}"


@functools.cache
def _table() -> dict[str, list[int]]:
    return json.loads(TABLE.read_text())


def blocks(
    kernel: str,
    capability: int | None,
    *,
    length: int,
    heads: int,
    size: int,
    precision: str,
    largest_chunk: int | None = None,
) -> Blocks:
    """Returns the sizes for a kernel and shape: measured ones, else those that compile best.

    Args:
        kernel: "forward" or "backward", or with "block_" before it.
        capability: compute capability of the GPU, 90 for 9.0.
        length: L.
        heads: of a group.
        size: the larger one of P, as the kernel sees it, and N.
        precision: of the products, "ieee" or "tf32"; for the block what its inputs allow.
        largest_chunk: a limit from the caller.

    Returns:
        Sizes that fit the length and the heads.
    """
    enough = max(16, 1 << (length - 1).bit_length())
    if largest_chunk is not None:
        enough = min(enough, max(16, 1 << (largest_chunk.bit_length() - 1)))
    one_chunk = length <= enough <= 64
    names = (key(kernel, c, one_chunk, size, precision) for c in (capability, None))
    best = next(Blocks(*_table()[name]) for name in names if name in _table())
    together = max(n for n in range(1, best.heads + 1) if heads % n == 0)
    return best._replace(chunk=min(best.chunk, enough), heads=together)
