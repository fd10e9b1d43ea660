"""Shared set-up: eight simulated devices, shape checks on, golden files, bounded memory."""

import ctypes
import gc
import os
from importlib.metadata import version
from pathlib import Path

# All must be set before JAX and Triton start; the suite is written for eight CPU devices.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What was compiled once is read the next time, in half the time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of what tests do. With little optimisation it takes three quarters of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# The older of XLA's two ways to emit loops compiles in 60 % of the time. Later versions lack the
# choice, and end the process when they meet a flag that they do not know.
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

from jaxtyping import install_import_hook

# Every annotation of the package is checked at call time from here on.
install_import_hook("tim4rec_jax", "beartype.beartype")

import hypothesis
import jax
import jaxtyping
import pytest

# An example may take its time on a busy machine.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def _one_device():
    """Has the package spread batches over one device: for eight, programs compile for longer."""
    every_device = jax.local_devices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda **which: every_device(**which)[:1])
        yield every_device


@pytest.fixture
def all_devices(_one_device, monkeypatch):
    """Has the package spread batches over all eight devices in this test."""
    monkeypatch.setattr(jax, "local_devices", _one_device)


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


@pytest.fixture
def no_shape_checks():
    """Lets wrong arguments through to the package, as without the import hook of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


PROCESS_MEMORY = Path("/proc/self/statm")
MOST_RESIDENT_BYTES = 900_000_000
GROWTH_BETWEEN_RELEASES = 200_000_000
_release_above = MOST_RESIDENT_BYTES


def _resident_bytes() -> int:
    """Returns the memory that this process holds, or 0 where the system does not tell."""
    if not PROCESS_MEMORY.exists():
        return 0
    return int(PROCESS_MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _bounded_memory():
    """Lets compiled programs go after a test that leaves the process above a limit.

    JAX keeps each program that it compiled, which adds up to several gigabytes over the suite.
    A later test reads the programs that it shares with earlier tests from the cache on disk.
    """
    global _release_above
    yield
    if _resident_bytes() > _release_above:
        jax.clear_caches()
        gc.collect()
        # Without this call, glibc keeps most of the freed memory for itself.
        ctypes.CDLL(None).malloc_trim(0)
        # What other objects hold must not make every test release again.
        _release_above = max(MOST_RESIDENT_BYTES, _resident_bytes() + GROWTH_BETWEEN_RELEASES)
