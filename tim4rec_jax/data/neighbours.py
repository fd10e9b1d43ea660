"""The neighbours of each item: those that users have near it, counted over the training events."""

import numpy as np
from jaxtyping import Float32, Int32
from scipy import sparse

from tim4rec_jax.data.dataset import Dataset, train_events

# Chosen on the validation of Amazon-Beauty and the KuaiRand slice, see docs/models.md.
_WINDOW = 20  # two events of a user that are further apart say nothing
_NEARNESS = 0.9  # what a pair counts against a pair that is one event nearer
_POWER_OF_ITEM, _POWER_OF_NEIGHBOUR = 0.5, 0.3  # of their numbers of events
_PAIRS_AT_ONCE = 1 << 25


def item_neighbours(
    dataset: Dataset, count: int, *, follow: bool = False
) -> tuple[Int32[np.ndarray, "V_and_1 M"], Float32[np.ndarray, "V_and_1 M"]]:
    """The most similar items of each item, and their similarities.

    Two items are similar if users have them near each other, in whatever order, or only one after
    the other. A pair of a user's training events that are d apart counts .9^(d - 1) up to d = 20.
    The sum over all pairs of the items i and j is divided by n_i^.5 n_j^.3, where n is an item's
    number of training events. (A plain cosine would divide by n_i^.5 n_j^.5, and prefer rare
    items.)

    It takes time in proportion to the events, and memory for the pairs of a part of the items.

    Args:
      dataset: as split; only events that training sees count.
      count: how many neighbours to keep of each item.
      follow: whether a pair counts for its first item alone, so that neighbours are what follows.

    Returns:
      Neighbours by falling similarity, of equals the lower number first, and their similarities.
      Row 0 is padding, and 0 completes the rows of items with fewer neighbours.
    """
    items, users = train_events(dataset)
    events = np.bincount(items, minlength=dataset.n_items + 1)[1:]
    neighbours = np.zeros((dataset.n_items + 1, count), np.int32)
    similarities = np.zeros(neighbours.shape, np.float32)
    of_item = np.maximum(np.append(1, events), 1).astype(np.float64)
    # An event is in at most 2 * _WINDOW pairs, so consecutive items have so many at once.
    parts = np.cumsum(events * (2 * _WINDOW)) // _PAIRS_AT_ONCE
    for part in np.unique(parts).tolist():
        rows = np.flatnonzero(parts == part) + 1
        first, last = int(rows[0]), int(rows[-1]) + 1
        near = sparse.csr_matrix((last - first, dataset.n_items + 1))
        places = np.flatnonzero((items >= first) & (items < last))
        for distance in range(1, _WINDOW + 1):
            for step in (distance,) if follow else (distance, -distance):
                others = places + step
                inside = (others >= 0) & (others < len(items))
                here, there = places[inside], others[inside]
                pairs = (users[here] == users[there]) & (items[here] != items[there])
                here, there = items[here[pairs]] - first, items[there[pairs]]
                weights = np.full(len(here), _NEARNESS ** (distance - 1))
                near += sparse.csr_matrix((weights, (here, there)), shape=near.shape)
        near = near.tocsr()
        row = np.repeat(np.arange(last - first), np.diff(near.indptr))
        similarity = near.data / (
            of_item[row + first] ** _POWER_OF_ITEM * of_item[near.indices] ** _POWER_OF_NEIGHBOUR
        )
        order = np.lexsort((near.indices, -similarity, row))
        place = np.arange(len(order)) - near.indptr[row]
        kept = place < count
        order, row, place = order[kept], row[kept], place[kept]
        neighbours[row + first, place] = near.indices[order]
        similarities[row + first, place] = similarity[order]
    return neighbours, similarities
