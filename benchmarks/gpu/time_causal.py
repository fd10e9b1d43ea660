"""Times the causal layer as one kernel and in parts, to decide which of them is the default.

Both are all that the layer does between its projections. "triton" is the fused block, the default
on a GPU. "parts" is one operation after the other around the op's kernel, "xla" has no kernel of
ours. Last comes a sentence for each shape: which way is the fastest, forward and backward.
"""

from functools import partial

import jax.numpy as jnp

from benchmarks.block_gpu import time_block
from benchmarks.gpu.common import Session
from benchmarks.ssd_gpu import input_sets
from tim4rec_jax.ssd.shapes import BEAUTY, ML_1M, Shape

# `configs/ml1m.py:causal` trains 16 rows of 200 positions, each with several histories.
PACKED = ML_1M._replace(name="ML-1M 64-d, packed", batch=16)


def time_shape(session: Session, shape: Shape, sets: list, gradient: bool) -> dict[str, float]:
    """Writes and returns the times of all ways at one shape, in microseconds."""
    repeats, times, segments = 1 if session.rehearse else 30, {}, None
    if shape.name == PACKED.name:
        segments = jnp.broadcast_to(jnp.arange(shape.length) // 70, (shape.batch, shape.length))
    for way in (session.kernel, "parts", "xla"):
        seconds = partial(time_block, shape, sets, repeats, gradient, way, segment_ids=segments)

        def figure(way=way, seconds=seconds):
            times[way] = round(seconds() * 1e6, 1)
            return {"us": times[way]}

        row = {"shape": shape.name, "batch": shape.batch, "gradient": gradient}
        session.attempt(figure, what="causal layer", way=way, **row)
    return times


def main() -> None:
    """Runs the command line."""
    session = Session("time_causal", __doc__)
    for shape in map(session.sized, (PACKED, BEAUTY, ML_1M)):
        sets = input_sets(shape.block_inputs(causal=True))
        times = time_shape(session, shape, sets, gradient=True)
        figures = ", ".join(f"{way} {us} us" for way, us in times.items())
        fastest = min(times, key=times.__getitem__, default="no way")
        where = f"{shape.batch} rows of {shape.length} positions ({shape.name})"
        said = f"Of the causal layer, {fastest} is the fastest for {where}: {figures}."
        print(said, flush=True)
        time_shape(session, shape, sets, gradient=False)
    session.finish()


if __name__ == "__main__":
    main()
