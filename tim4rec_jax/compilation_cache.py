"""Compiled programs kept on disk: a resumed run or another seed starts at once."""

import os
from pathlib import Path

import jax


def enable() -> None:
    """Keeps what JAX compiles under `~/.cache/tim4rec-jax/xla` (or XDG_CACHE_HOME).

    JAX_COMPILATION_CACHE_DIR, where set, names another place. Deleting it is always safe.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "tim4rec-jax" / "xla"))
    # Small programs, too: drawing the first weights of a model is some fifty of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
