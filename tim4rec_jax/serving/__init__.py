"""Recommendations from a trained run: as a library, from the shell, in bulk."""

from typing import TYPE_CHECKING

from tim4rec_jax.serving.sqlite_store import SQLiteStore
from tim4rec_jax.serving.store import MemoryStore, Store

if TYPE_CHECKING:
    from tim4rec_jax.serving.recommender import Recommendations, Recommender

__all__ = ["MemoryStore", "Recommendations", "Recommender", "SQLiteStore", "Store"]


def __getattr__(name: str):
    # These import JAX, which the command line's --help and mistyped flags need not wait for.
    if name in ("Recommendations", "Recommender"):
        from tim4rec_jax.serving import recommender

        return getattr(recommender, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
