"""Times mamba_ssm's Triton pipeline in PyTorch, whose products of float32 are tf32.

A call starts some fifteen kernels from Python, which is most of its time at small shapes. It needs
PyTorch and the module `mamba_ssm.ops.triton.ssd_combined`.
"""

import os

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.gpu.common import Session
from benchmarks.ssd_gpu import input_sets, time_mamba
from tim4rec_jax.ssd.shapes import BEAUTY, ML_1M, in_bfloat16


def main() -> None:
    """Runs the command line."""
    session = Session("time_mamba", __doc__)
    for shape in (BEAUTY, ML_1M, in_bfloat16(BEAUTY)):
        shape = session.sized(shape)
        sets = input_sets(shape.op_inputs())
        for gradient in (False, True):

            def figures(shape=shape, sets=sets, gradient=gradient):
                repeats = 1 if session.rehearse or session.warm else 30
                seconds = time_mamba(shape, sets, repeats, gradient)
                # None where it is not installed
                return {"us": None if seconds is None else round(seconds * 1e6, 1)}

            session.attempt(figures, what="mamba_ssm", shape=shape.name, gradient=gradient)
    session.finish()


if __name__ == "__main__":
    main()
