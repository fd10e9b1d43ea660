"""The kernels as the TPU's own compilers take them, from the first stage to four chips."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tests.ssd import test_block as block
from tests.ssd.cases import Case, make, outcome, to_dtype
from tim4rec_jax.ssd import compile_for

ROOT = Path(__file__).parents[2]
# In a process of its own: where libtpu can be found, every program prints its warnings.
PROGRAM = """
from benchmarks.tpu_compile import compiled, step, topologies

devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
figures = compiled(*step(64, "float32"), devices, kernels=True)
print(figures.kernels, figures.exchanges)
"""


def kernels(function, arguments) -> int:
    """Returns how many kernels Mosaic, whose first stage needs no TPU, accepts in a program."""
    with compile_for("tpu"):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("tpu_custom_call")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_op_and_block_lower_with_their_gradients(dtype):
    inputs, weights, options = make(Case("", 50, heads=4, width=32, size=32, segments=True))
    arguments = to_dtype((inputs, weights), dtype)
    assert kernels(lambda *a: outcome(*a, **options, implementation="tpu"), arguments) == 2

    inputs, weights, options = block.make(50, size=8)
    arguments = to_dtype((inputs, weights), dtype)
    assert kernels(lambda *a: block.outcome(*a, **options, implementation="tpu"), arguments) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT / ".venv" / "tpu").exists(),
    reason="no libtpu in .venv/tpu: `make test` puts it there",
)
def test_the_training_step_compiles_for_four_chips():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # Forward and backward of the one layer that computes every position; rows stay where they are.
    assert result.stdout.split() == ["2", "0"]
