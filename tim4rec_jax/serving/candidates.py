"""The items that may be recommended."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from tim4rec_jax.serving.catalogue import Catalogue
from tim4rec_jax.serving.engine import power_of_two


@dataclass(frozen=True)
class Candidates:
    """Items as a table of their own, to be ranked.

    Attributes:
        table: embeddings of the items from row 1 on, then rows that are never recommended.
        items: index of each row in the catalogue, rising; the first is the padding, 0.
        popular: the items, most popular first.
    """

    table: Float[Array, "rows D"]
    items: Int32[np.ndarray, " C"]
    popular: Int32[np.ndarray, " P"]

    @classmethod
    def build(
        cls,
        catalogue: Catalogue,
        table: Float[Array, "rows D"],
        allow: frozenset[str] | None,
        deny: frozenset[str] | None,
    ) -> Candidates:
        """All items of the catalogue, or those in `allow`, without those in `deny`."""
        items = np.arange(1, len(catalogue) + 1, dtype=np.int32)
        if allow is not None:
            items = np.intersect1d(items, catalogue.indices(allow))
        if deny is not None:
            items = np.setdiff1d(items, catalogue.indices(deny))
        popular = items[np.argsort(-catalogue.counts[items - 1], kind="stable")]
        if len(items) < len(catalogue):
            rows = min(power_of_two(len(items) + 1, 16), len(table))
            # A score that is not a number is never recommended.
            filler = jnp.full((rows - len(items) - 1, table.shape[1]), jnp.nan, table.dtype)
            table = jnp.concatenate([table[np.append(0, items)], filler])
        return cls(table, np.append(np.int32(0), items), popular)

    def places(self, items: Int32[np.ndarray, "B S"]) -> Int32[np.ndarray, "B S"]:
        """The rows of items given by their index in the catalogue, 0 for others."""
        rows = np.minimum(np.searchsorted(self.items, items), len(self.items) - 1)
        return np.where(self.items[rows] == items, rows, 0).astype(np.int32)
