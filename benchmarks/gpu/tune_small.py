"""Times a few tile sizes and precisions at the released 64-d shapes.

Among them is "tf32x3", three products on tensor cores that together keep about float32.
`python -m benchmarks.tune_triton` tries all tile sizes and writes the table.
"""

import itertools

from benchmarks.gpu.common import Session
from benchmarks.tune_triton import seconds
from tim4rec_jax.ssd.shapes import BEAUTY, ML_1M, random_inputs
from tim4rec_jax.ssd.triton.launch import TileSizes

PLAN = [
    *(("forward", BEAUTY, TileSizes(64, h, w, 1)) for h, w in ((4, 8), (4, 4), (2, 4), (1, 4))),
    *(("backward", BEAUTY, TileSizes(64, h, w, 1)) for h, w in ((4, 8), (1, 8), (1, 4))),
    *(("block_forward", BEAUTY, TileSizes(64, 4, w, 1)) for w in (4, 8, 16)),
    *(("block_backward", BEAUTY, TileSizes(64, 4, w, 1)) for w in (8, 16)),
    *(("forward", ML_1M, TileSizes(*t, 4, 1)) for t in ((16, 2), (32, 1), (64, 1))),
]


def main() -> None:
    """Runs the command line."""
    session = Session("tune_small", __doc__)
    for (kernel, shape, tiles), precision in itertools.product(PLAN, ("ieee", "tf32x3", "tf32")):
        shape = session.sized(shape)
        block = kernel.startswith("block")
        inputs = random_inputs(shape.block_inputs() if block else shape.op_inputs(), 0)
        session.attempt(
            lambda k=kernel, t=tiles, p=precision, v=inputs: {
                "us": round(
                    seconds(k, t, v, p, 1 if session.rehearse else 20, session.kernel) * 1e6, 1
                )
            },
            kernel=kernel,
            length=shape.length,
            precision=precision,
            tiles=list(tiles),
        )
    session.finish()


if __name__ == "__main__":
    main()
