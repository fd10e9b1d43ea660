"""The training step with the fused kernel, compiled for four chips by the TPU's own compiler."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# In a process of its own: where libtpu can be found, every program prints its warnings.
PROGRAM = """
from benchmarks.tpu_compile import compiled, step, topologies

devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
figures = compiled(*step(64, "float32"), devices, kernels=True)
print(figures.kernels, figures.exchanges)
"""


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
