"""Times op and block against XLA and a copy, at the released 64-d shapes."""

from functools import partial

from benchmarks.block_gpu import time_block
from benchmarks.gpu.common import Session
from benchmarks.ssd_gpu import input_sets, time_copy, time_op
from tim4rec_jax.ssd.shapes import BEAUTY, ML_1M, Shape, in_bfloat16


def time_shape(
    session: Session, shape: Shape, op_sets: list, block_sets: list, gradient: bool
) -> None:
    """Writes the times of all ways to compute the op and the block at one shape."""
    repeats = 1 if session.rehearse else 30
    ours = partial(time_op, op_sets, repeats, gradient, implementation=session.kernel)
    whole = partial(time_block, shape, block_sets, repeats, gradient)
    ways = {
        ("op", "copy"): partial(time_copy, shape.op_bytes(gradient), repeats),
        ("op", session.kernel): ours,
        ("op", "xla"): partial(time_op, op_sets, repeats, gradient, implementation="xla"),
        ("block", "copy"): partial(time_copy, shape.block_bytes(gradient), repeats),
        **{("block", name): partial(whole, name) for name in (session.kernel, "parts", "xla")},
    }
    if shape.dtype == "float32":
        for precision in ("ieee", "tf32"):
            ways["op", f"{session.kernel}, {precision}"] = partial(ours, precision=precision)
    for (what, way), seconds in ways.items():
        session.attempt(
            lambda seconds=seconds: {"us": round(seconds() * 1e6, 1)},
            what=what,
            way=way,
            shape=shape.name,
            gradient=gradient,
        )


def main() -> None:
    """Runs the command line."""
    session = Session("time_op", __doc__)
    for shape in map(session.sized, (BEAUTY, ML_1M, in_bfloat16(BEAUTY), in_bfloat16(ML_1M))):
        sets = input_sets(shape.op_inputs()), input_sets(shape.block_inputs())
        for gradient in (False, True):
            time_shape(session, shape, *sets, gradient)
    session.finish()


if __name__ == "__main__":
    main()
