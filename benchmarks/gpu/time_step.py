"""Times a training step as trained, and with one thing changed.

That is: without the kernels, with full float32 products, and without the promise that every run has
the same bits, for which XLA picks its programs by a fixed rule instead of by their speed.
"""

from contextlib import nullcontext
from unittest import mock

import jax

from benchmarks import train_step
from benchmarks.gpu.common import Session, without_kernels
from benchmarks.train_step import CASES, load, measure, train_stepper
from tim4rec_jax.runtime import keep_bits
from tim4rec_jax.training.step import update


def any_bits():
    """Within it, XLA may take the fastest programs that it finds."""
    free = jax.jit(
        update,
        static_argnames="settings",
        donate_argnames="state",
        compiler_options={"xla_gpu_deterministic_ops": False},
    )
    return mock.patch.object(train_step, "train_step", free)


def main() -> None:
    """Runs the command line."""
    keep_bits()  # as `train.py` does, before JAX starts
    session = Session("time_step", __doc__)
    cases = [(path, rows, n_items) for path, rows, n_items, _ in CASES.values()]
    cases.append(("configs/ml1m.py", 2048, 3_416))  # as configs/ml1m.py trains
    for label, context in (
        ("as trained", nullcontext),
        ("without kernels", without_kernels),
        ("any bits", any_bits),
        ("float32 products", lambda: jax.default_matmul_precision("highest")),
    ):
        for path, rows, n_items in cases:
            rows, n_items = (4, 50) if session.rehearse else (rows, n_items)

            def figures(path=path, rows=rows, n_items=n_items, context=context):
                with context():
                    step, state, temporary = train_stepper(load(path), rows, n_items)
                    wall, *_ = measure(step, state, 1 if session.rehearse else 5)
                return {
                    "ms": round(wall * 1e3, 3),
                    "samples_per_s": round(rows / wall),
                    "temporary_mb": round(temporary),
                }

            session.attempt(figures, config=path, rows=rows, step=label)
    session.finish()


if __name__ == "__main__":
    main()
