"""Whether the kernels run here at all: op and block against XLA, values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.common import Session
from tim4rec_jax.ssd import ssd, time_aware_ssd_block
from tim4rec_jax.ssd.shapes import BEAUTY, random_inputs


def main() -> None:
    """Runs the command line."""
    session = Session("smoke", __doc__)
    shape = session.sized(BEAUTY, batch=8)

    def op(inputs, implementation) -> Any:
        return ssd(**inputs, dt_softplus=True, implementation=implementation)

    def block(inputs, implementation) -> Any:
        settings = {"activation": "hardswish", "state": shape.state}
        return time_aware_ssd_block(**inputs, **settings, implementation=implementation)

    for name, function, inputs in (
        ("op", op, random_inputs(shape.op_inputs(), 0)),
        ("block", block, random_inputs(shape.block_inputs(), 0)),
    ):

        def worst(function=function, inputs=inputs):
            def outcome(implementation):
                def total(inputs):
                    y = function(inputs, implementation)
                    return jnp.sum(jnp.sin(y)), y

                return jax.jit(jax.grad(total, has_aux=True))(inputs)

            pairs = zip(
                jax.tree.leaves(outcome(session.kernel)),
                jax.tree.leaves(outcome("reference" if session.rehearse else "xla")),
                strict=True,
            )
            error = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)
            return {"worst": error, "ok": bool(np.less(error, 1e-3))}  # False for NaN

        session.attempt(worst, what=name)
    session.finish()


if __name__ == "__main__":
    main()
