"""Shared set-up: eight simulated devices, shape checks on, golden files."""

import os
from pathlib import Path

# All must be set before JAX and Triton start; the suite is written for eight CPU devices.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What was compiled once is read the next time, in half the time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of what tests do; with little optimisation it takes three quarters of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

from jaxtyping import install_import_hook

# Every annotation of the package is checked at call time from here on.
install_import_hook("tim4rec_jax", "beartype.beartype")

import hypothesis
import jax
import pytest

# An example may take its time on a busy machine.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture
def golden() -> Path:
    """Folder with the small golden files: what the reference code computes."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def golden_all(golden: Path) -> Path:
    """The whole golden folder, the large files included, where TIM4REC_GOLDEN names it."""
    return Path(os.environ.get("TIM4REC_GOLDEN", golden))


@pytest.fixture
def x64():
    """Runs the test with 64-bit types enabled."""
    with jax.enable_x64(True):
        yield
