"""Times a few tile sizes and precisions at the released 64-d shapes.

Among them is "tf32x3", three products on tensor cores that together keep about float32.
`python -m benchmarks.tune_triton` tries all tile sizes and writes the table.
"""

import itertools
import math
from functools import partial
from unittest import mock

from benchmarks.gpu.common import Session
from benchmarks.tune_triton import seconds
from tim4rec_jax.ssd.shapes import BEAUTY, ML_1M, Shape, random_inputs
from tim4rec_jax.ssd.triton import launch
from tim4rec_jax.ssd.triton.launch import TileSizes

PLAN = [
    *(("forward", BEAUTY, TileSizes(64, h, w, 1)) for h, w in ((4, 4), (4, 8), (2, 4), (1, 4))),
    *(("forward", ML_1M, TileSizes(16, h, 1, s)) for h, s in ((2, 1), (1, 1), (1, 2))),
    # Some spill registers and issue fewer instructions.
    *(("backward", BEAUTY, TileSizes(*t, 1)) for t in ((16, 4, 2), (64, 4, 4), (16, 4, 1))),
    *(("backward", ML_1M, TileSizes(16, 4, w, 1)) for w in (2, 1)),
    *(("block_backward", ML_1M, TileSizes(16, 4, w, 1)) for w in (2, 1, 4)),
    *(("block_forward", ML_1M, TileSizes(16, 4, w, 1)) for w in (1, 2)),
    *(("block_forward", BEAUTY, TileSizes(64, 4, w, 1)) for w in (4, 8)),
    *(("block_backward", BEAUTY, TileSizes(64, 4, w, 1)) for w in (4, 8)),
]


def with_precision(kernel: str, precision: str):
    """Within it, the kernel of this name computes its products in this precision."""
    released = launch.launch

    def changed(function, *arguments, specialisation, **options):
        if function.fn.__name__ == kernel:
            specialisation = specialisation._replace(PRECISION=precision)
        return released(function, *arguments, specialisation=specialisation, **options)

    return mock.patch.object(launch, "launch", changed)


def time_candidate(
    session: Session, kernel: str, shape: Shape, tiles: TileSizes, precision: str
) -> dict[str, float]:
    """Returns the time of one candidate.

    Raises:
        RuntimeError: it does not fit this GPU.
    """
    block = kernel.startswith("block")
    inputs = random_inputs(shape.block_inputs() if block else shape.op_inputs(), 0)
    repeats = 1 if session.rehearse else 20
    with with_precision(kernel, precision):
        time = seconds(kernel, tiles, inputs, "ieee", repeats, session.kernel)
    if math.isinf(time):
        raise RuntimeError("it does not fit this GPU, see the line above")
    return {"us": round(time * 1e6, 1)}


def main() -> None:
    """Runs the command line."""
    session = Session("tune_small", __doc__)
    for precision, (kernel, shape, tiles) in itertools.product(("tf32x3", "ieee", "tf32"), PLAN):
        shape = session.sized(shape)
        session.attempt(
            partial(time_candidate, session, kernel, shape, tiles, precision),
            kernel=kernel,
            length=shape.length,
            precision=precision,
            tiles=list(tiles),
        )
    session.finish()


if __name__ == "__main__":
    main()
