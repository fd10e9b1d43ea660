"""Compiled programs kept on disk: a resumed run or another seed starts at once."""

import os
import warnings
from pathlib import Path

import jax


def enable() -> None:
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
