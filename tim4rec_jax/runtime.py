"""Where programs run: devices and sharding, and the cache of compiled programs."""

import contextlib
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# ---- devices
# How a batch lies on this process's devices: rows spread, everything else on each.


class Placement(NamedTuple):
    """Shardings over the first `devices` local devices."""

    devices: int
    by_row: NamedSharding
    replicated: NamedSharding


def data_sharding(rows: int) -> Placement:
    """Spreads batches of `rows` over as many local devices as divide them evenly."""
    devices = jax.local_devices()
    devices = devices[: math.gcd(len(devices), rows)]
    mesh = Mesh(np.asarray(devices), ("batch",))
    return Placement(
        len(devices),
        NamedSharding(mesh, PartitionSpec("batch")),
        NamedSharding(mesh, PartitionSpec()),
    )


# ---- compilation_cache
# Compiled programs kept on disk: a resumed run or another seed starts at once.


def enable_compilation_cache() -> None:
    """Keeps what JAX compiles under `~/.cache/tim4rec-jax/xla` (or XDG_CACHE_HOME).

    JAX_COMPILATION_CACHE_DIR, where set, names another place. Deleting it is always safe.
    """
    # What a kill or a full disk cut off is compiled again.
    unreadable = "Error (reading|writing) persistent compilation cache entry"
    warnings.filterwarnings("ignore", unreadable, UserWarning)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "tim4rec-jax" / "xla"))
    # Small programs, too: drawing the first weights of a model is some fifty of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


class Target(NamedTuple):
    """What programs are compiled for.

    Attributes:
        platform: "cpu", "gpu" or "tpu", as `jax.default_backend` names it.
        compute_capability: of an NVIDIA GPU that need not be in this machine, 90 for an H100;
            None where the platform's own device tells.
    """

    platform: str
    compute_capability: int | None = None


_context = jax.make_user_context()


def compile_for(
    platform: str, compute_capability: int | None = None
) -> contextlib.AbstractContextManager[None]:
    """Within it, programs are traced as they would be on another platform.

    That is how they are lowered or compiled ahead of time: implementations are chosen, and
    refused, for that platform. Arrays still live, and calls still run, on the platform at hand.

    Args:
        platform: "cpu", "gpu" or "tpu".
        compute_capability: of an NVIDIA GPU, 90 for an H100.

    Returns:
        A context manager.
    """
    return _context(Target(platform, compute_capability))


def target() -> Target:
    """Returns what is compiled for: the nearest `compile_for`, else the default backend."""
    return _context.value or Target(jax.default_backend())
