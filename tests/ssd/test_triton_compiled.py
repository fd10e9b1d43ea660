"""The Triton kernels as machine code and in a training step, without a GPU.

In processes of their own: the suite runs with Triton's interpreter, and the plugin that lowering
needs (`make test` puts it into a folder apart) prints to every program that finds it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(sys.prefix, "cuda")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None,
    reason="the kernels need jax-triton: pip install '.[kernels]'",
)


def run(module, *arguments, paths=()):
    """Standard output of a module, line by line, from JSON."""
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


OP = [("", 32, "float32"), ("", 128, "float32")]  # of the 64-d and the 256-d models
BLOCK = [("block_", 32, "float32"), ("block_", 32, "bfloat16")]


# That the kernels compile is also seen by the test below. A spill makes them slow and not wrong.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "shapes", "kernels"),
    [
        ("90", ("0", "1", "8", "9", "20", "21", "22", "23"), [*OP, *BLOCK]),
        # The tightest; benchmarks/RESULTS.md has all.
        ("80", ("22", "23"), BLOCK[1:]),
    ],
)
def test_no_registers_are_spilled(capability, shapes, kernels):
    """At the released sizes."""
    arguments = ("--capabilities", capability, "--shapes", *shapes)
    rows = run("benchmarks.triton_compile", "--json", *arguments)
    assert [(row["kernel"], row["width"], row["length"], row["dtype"]) for row in rows] == [
        (f"{prefix}{direction}", width, length, dtype)
        for prefix, width, dtype in kernels
        for length in (50, 200)
        for direction in ("forward", "backward")
    ]
    for row in rows:
        assert row["spills"] == 0, row
        # What a program may have on every GPU of compute capability 8.0 or more.
        assert row["registers"] <= 255 and row["shared"] <= 99 * 1024, row


@pytest.mark.skipif(not PLUGIN.exists(), reason=f"no CUDA plugin in {PLUGIN}: run make test")
def test_the_training_step_lowers_for_cuda_with_the_kernels_in_it():
    (step,) = run("tests.training.lower_for_cuda", paths=[PLUGIN])
    assert step["kernels"] == ["ssd_block_forward", "ssd_block_backward"]
    assert step["unsafe"] == []
    assert step["scatters"] > 0  # what they look like is known
