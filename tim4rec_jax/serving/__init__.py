"""Recommendations from a trained run: as a library, from the shell, in bulk."""

from tim4rec_jax.serving.recommender import Recommendations, Recommender
from tim4rec_jax.serving.sqlite_store import SQLiteStore
from tim4rec_jax.serving.store import MemoryStore, Store

__all__ = ["MemoryStore", "Recommendations", "Recommender", "SQLiteStore", "Store"]
