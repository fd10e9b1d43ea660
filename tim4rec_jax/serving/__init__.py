"""Recommendations from a trained run: as a library, from the shell, in bulk."""

from tim4rec_jax.serving.recommender import Recommendations, Recommender
from tim4rec_jax.serving.redis_store import RedisStore
from tim4rec_jax.serving.stores import MemoryStore, SQLiteStore, Store

__all__ = ["MemoryStore", "Recommendations", "Recommender", "RedisStore", "SQLiteStore", "Store"]
