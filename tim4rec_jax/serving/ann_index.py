"""Search without scoring every item: a navigable small world of FAISS (arXiv 1603.09320)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from tim4rec_jax.errors import UserError
from tim4rec_jax.files import atomic_write

# Neighbours of an item, and how many candidates are kept while it is put into the graph and
# while it is searched. Finds .97 of the ten best of 12,101 trained items (benchmarks.serving).
_NEIGHBOURS, _BUILDING, _SEARCHING = 16, 80, 128


class ApproximateIndex:
    """The best items, found by going from item to item through a graph of similar ones.

    Scores are exact; now and then an item is missed.
    """

    def __init__(self, table: Float[Array | np.ndarray, "rows D"], kept: Path | None = None):
        """Reads the graph, or builds it: a second for 10,000 items, minutes for a million.

        Args:
            table: item embeddings, row 0 is padding.
            kept: file with the graph; written where it is missing or another table's. None: no
                file.

        Raises:
            UserError: FAISS is not installed.
        """
        try:
            import faiss
        except ModuleNotFoundError as error:
            raise UserError("FAISS is not installed; pip install 'tim4rec-jax[ann]'") from error
        self.table = np.asarray(table, np.float32)
        self._index: Any = None if kept is None else _read(kept, self.table[1:])
        if self._index is None:
            width = self.table.shape[1]
            self._index = faiss.IndexHNSWFlat(width, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            self._index.hnsw.efConstruction = _BUILDING
            self._index.add(self.table[1:])
            if kept is not None:
                _write(self._index, kept)
        self._index.hnsw.efSearch = _SEARCHING

    def best(
        self,
        hidden: Float[Array | np.ndarray, "R D"],
        k: int,
        had: Int32[np.ndarray, "B S"] | None = None,
        offset: float | None = None,
    ) -> tuple[Float32[np.ndarray, "B k"], Int32[np.ndarray, "B k"]]:
        """Scores and items of the `k` best, item 0 with score -inf where fewer were found.

        Args:
            hidden: states of users, the first B of them of interest.
            k: how many.
            had: items that the histories hold, 0 for nothing; left out, or offset. None: R = B.
            offset: added to the scores of those; None leaves them out.
        """
        states = np.asarray(hidden, np.float32)
        if had is None:
            scores, items = self._index.search(states, k)
            return scores, (items + 1).astype(np.int32)
        states = states[: len(had)]
        scores, items = self._index.search(states, min(k + had.shape[1], self._index.ntotal))
        items = (items + 1).astype(np.int32)
        for row, mine in enumerate(had):
            scores[row, np.isin(items[row], mine)] = -np.inf
        if offset is not None:
            # They are scored whether or not the search has found them, each once.
            ordered = np.sort(had, axis=1)
            again = np.diff(ordered, axis=1, prepend=0) == 0
            own = np.einsum("bd,bsd->bs", states, self.table[ordered]) + offset
            scores = np.concatenate([scores, np.where(again, -np.inf, own)], axis=1)
            items = np.concatenate([items, ordered], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(scores, best, axis=1).astype(np.float32)
        items = np.where(scores > -np.inf, np.take_along_axis(items, best, axis=1), 0)
        missing = ((0, 0), (0, k - items.shape[1]))
        return np.pad(scores, missing, constant_values=-np.inf), np.pad(items, missing)


def _read(path: Path, table: np.ndarray) -> Any:
    """The graph in a file if it is one of these items, else None."""
    import faiss

    try:
        index = faiss.read_index(str(path))
    except RuntimeError:  # missing, or damaged
        return None
    same = isinstance(index, faiss.IndexHNSWFlat) and (index.ntotal, index.d) == table.shape
    # It holds the vectors themselves.
    return index if same and np.array_equal(index.reconstruct_n(0, index.ntotal), table) else None


def _write(index: Any, path: Path) -> None:
    """Writes a file whole or not at all; one that cannot be written is built again next time."""
    import faiss

    with contextlib.suppress(RuntimeError, UserError), atomic_write(path) as file:
        faiss.write_index(index, file.name)
