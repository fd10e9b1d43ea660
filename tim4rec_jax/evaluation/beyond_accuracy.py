"""What lists of best items are like besides accurate: coverage, popularity, novelty, and so on.

The definitions are those of RecTools 0.19, and of RecBole for the Gini coefficient. All but the
first two are means over users.

    coverage      share of the catalogue that is in the list of somebody
    gini          inequality of how often the items of the catalogue are listed: 0 if all are as
                  often, near 1 if few items have all places
    popularity    mean number of training events of a listed item
    novelty       mean self-information of a listed item, -log2 of the share of users who have it in
                  training; an item that nobody has counts as if one user had it
    diversity     mean of 1 - cosine over the pairs of a list; 0 for a list of one item
    serendipity   mean over the places of a list of max(P_user - P_all, 0) for the target and 0 for
                  other items. P = (items + 1 - place) / items, for the place in the list and for
                  that in the order of popularity; P_all is 0 for an item without training events

Lists are counted batch by batch: nothing has a row for each user and a column for each item.

Diversity needs to know which items are alike. Item vectors would make it depend on the model that
is judged, and most logs have no features. So two items are alike if the same users have both in
training: the cosine between their columns of the user-item matrix of zeros and ones.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int32, Int64
from scipy import sparse

from tim4rec_jax.data import Dataset

NAMES = ("coverage", "gini", "popularity", "novelty", "diversity", "serendipity")
_PER_LIST = ("popularity", "novelty", "serendipity")
# Events, and pairs of listed items, that are looked at together.
_EVENTS_AT_ONCE = _PAIRS_AT_ONCE = 1 << 20
# The lists that diversity is measured on: so many, fewer if they are long, and none longer.
_MOST_LISTS, _FEWEST_LISTS, _MOST_PAIRS_LISTED = 10_000, 100, 16_000_000
_LONGEST = 1000
# The numbers of common users are kept for this many pairs of items, 400 MB as a square matrix and
# 1.2 GB at the most as a sparse one. To count them takes so many multiplications, a few seconds.
_MOST_PAIRS = 100_000_000
_MOST_WORK = 1_000_000_000


class BeyondAccuracy:
    """Collects lists of best items, and says what they are like.

    The memory that it takes is a few numbers for each item, and at most 10,000 lists.

    Attributes:
        sampled: what diversity is measured on, once there are figures, where that is not all lists
            and the items of all users; otherwise "".
    """

    def __init__(self, dataset: Dataset, ks: Sequence[int], n_lists: int):
        """Reads the training events of a dataset.

        Args:
            dataset: the dataset, split as for the training.
            ks: the lengths of the lists that are judged.
            n_lists: how many lists will be added. Where there are more than 10,000, or fewer of
                more than 50 items, diversity is that of a part of them, spread evenly.
        """
        self._dataset, self._ks, items = dataset, tuple(ks), dataset.n_items
        self._longest = max((k for k in self._ks if k <= _LONGEST), default=0)
        pairs = max(self._longest * (self._longest - 1) // 2, 1)
        most = min(max(_MOST_PAIRS_LISTED // pairs, _FEWEST_LISTS), _MOST_LISTS)
        self._every = max(-(-n_lists // most), 1)
        self._exposure = np.zeros((len(self._ks), items + 1), np.int64)
        self._sums = {name: np.zeros(len(self._ks)) for name in _PER_LIST}
        self._count, self._added, self._kept, self.sampled = 0, 0, [], ""

        events, users = np.zeros(items + 1, np.int64), np.zeros(items + 1, np.int64)
        n_users = 0
        for had, counts in _training_items(dataset):
            users += np.bincount(had.indices, minlength=items + 1)
            events += counts
            n_users += int((np.diff(had.indptr) > 0).sum())
        self._popularity = events.astype(np.float64)
        # An item that nobody has in training counts as if one user had it.
        self._novelty = -np.log2(np.maximum(users, 1) / max(n_users, 1))
        # The place of an item in the order of popularity; items of equal counts share one.
        distinct = np.unique(events[1:][events[1:] > 0])[::-1]
        place = 1 + np.searchsorted(-distinct, -events)
        self._expected = np.where(events > 0, (items + 1 - place) / items, 0.0)

    def add(self, lists: Int[np.ndarray, "B K"], targets: Int[np.ndarray, " B"]) -> None:
        """Adds lists of best items.

        Args:
            lists: items, best first, 0 where a list is shorter than K, which is the largest of the
                `ks` or the number of items.
            targets: the item of each user that is right.
        """
        filled = lists > 0
        rank = np.arange(1, lists.shape[1] + 1)
        items = self._dataset.n_items
        surprise = np.maximum((items + 1 - rank) / items - self._expected[lists], 0.0)
        values = {
            "popularity": self._popularity[lists] * filled,
            "novelty": self._novelty[lists] * filled,
            "serendipity": surprise * (filled & (lists == targets[:, None])),
        }
        some = filled[:, 0]
        for number, k in enumerate(self._ks):
            self._exposure[number] += np.bincount(lists[:, :k].ravel(), minlength=items + 1)
            length = np.maximum(filled[:, :k].sum(axis=1), 1)
            for name, value in values.items():
                self._sums[name][number] += (value[:, :k].sum(axis=1) / length)[some].sum()
        self._count += int(some.sum())
        chosen = (self._added + np.arange(len(lists))) % self._every == 0
        self._kept.append(lists[chosen & some, : self._longest].astype(np.int32))
        self._added += len(lists)

    def figures(self) -> dict[str, float]:
        """The figures of `NAMES` at every k, "coverage@10" and so on, not rounded.

        There is no diversity of lists with more than 1,000 items, which have too many pairs.
        """
        found: dict[str, Any] = {}
        exposure = self._exposure[:, 1:]
        found["coverage"] = (exposure > 0).mean(axis=1)
        found["gini"] = [gini(counts) for counts in exposure]
        means = {name: sums / max(self._count, 1) for name, sums in self._sums.items()}
        lists = np.concatenate(self._kept) if self._kept else np.zeros((0, 1), np.int32)
        found |= means | {"diversity": self._diversity(lists)}
        return {
            f"{name}@{k}": float(found[name][number])
            for name in NAMES
            for number, k in enumerate(self._ks)
            if name != "diversity" or k <= self._longest
        }

    def _diversity(self, lists: Int32[np.ndarray, "N K"]) -> Float64[np.ndarray, " ks"]:
        """The mean distance of two items in a list, over the lists, for every k.

        A list of one item has no pair, and its diversity is 0.
        """
        listed, places = np.unique(lists, return_inverse=True)
        places, (common, share) = places.reshape(lists.shape), _common_users(self._dataset, listed)
        parts = []
        if self._every > 1:
            parts.append(f"{len(lists):,} of {self._count:,} lists, spread evenly")
        if share < 1:
            parts.append(f"what {share:.1%} of the users have in training, chosen at random")
        self.sampled = f"diversity is measured on {' and '.join(parts)}" if parts else ""
        size = np.sqrt(np.maximum(common.diagonal(), 1).astype(np.float64))
        # In this order, the pairs of a shorter list are the first of those of a longer one.
        second, first = np.tril_indices(lists.shape[1], -1)
        ends = np.array([k * (k - 1) // 2 for k in self._ks]).clip(max=len(first))
        distances = np.zeros(len(self._ks))
        pieces = -(-len(lists) * len(first) // _PAIRS_AT_ONCE)
        for some in np.array_split(np.arange(len(lists)), max(pieces, 1)):
            rows, columns = places[some][:, first], places[some][:, second]
            both = (lists[some][:, first] > 0) & (lists[some][:, second] > 0)
            together = np.asarray(common[rows.ravel(), columns.ravel()]).reshape(rows.shape)
            distance = np.where(both, 1 - together / (size[rows] * size[columns]), 0.0)
            for number, end in enumerate(ends):
                pairs = np.maximum(both[:, :end].sum(axis=1), 1)
                distances[number] += (distance[:, :end].sum(axis=1) / pairs).sum()
        return distances / max(len(lists), 1)


def gini(counts: Int[np.ndarray, " n"]) -> float:
    """The Gini coefficient of counts: 0 if all are equal, (n - 1) / n if one has all.

    It is the mean absolute difference of two counts, over twice the mean count. Counts that are all
    0 give 0.
    """
    n, total = len(counts), counts.sum()
    if total == 0:
        return 0.0
    places = 2 * np.arange(1, n + 1) - n - 1
    return float((places * np.sort(counts)).sum() / (n * total))


def _training_items(dataset: Dataset) -> Iterator[tuple[sparse.csr_array, Int64[np.ndarray, " n"]]]:
    """Some users after the other: which items they have in training, and how often items occur.

    The matrix has a row for each of the users and a column for each item, item 0 among them. It
    holds a one for each item of a user.
    """
    width, ends = dataset.n_items + 1, dataset.splits.train
    for chunk in dataset.chunks:
        stop = chunk.start + len(chunk.items)
        first, last = np.searchsorted(dataset.offsets, [chunk.start, stop])
        while first < last:
            # As many whole users as fit, and at least one.
            reach = dataset.offsets[first] + _EVENTS_AT_ONCE
            until = int(np.searchsorted(dataset.offsets[: last + 1], reach, side="right")) - 1
            until = max(until, first + 1)
            low, high = dataset.offsets[first], dataset.offsets[until]
            items = chunk.items[low - chunk.start : high - chunk.start].astype(np.int64)
            lengths = np.diff(dataset.offsets[first : until + 1])
            users = np.repeat(np.arange(until - first), lengths)
            number = np.arange(high - low) - np.repeat(dataset.offsets[first:until] - low, lengths)
            trains = number < ends[first:until][users]
            pairs = np.unique(users[trains] * width + items[trains])
            rows, columns = np.divmod(pairs, width)
            starts = np.searchsorted(rows, np.arange(until - first + 1))
            ones = np.ones(len(columns), np.float32)
            had = sparse.csr_array((ones, columns, starts), shape=(until - first, width))
            yield had, np.bincount(items[trains], minlength=width)
            first = until


def _common_users(
    dataset: Dataset, items: Int[np.ndarray, " M"]
) -> tuple[sparse.csr_array | Float32[np.ndarray, "M M"], float]:
    """How many users have both of two items in training, for some items.

    The work is the sum of the squares of the numbers of such items that users have. Where it is
    beyond all measure, a part of the users stands for all, chosen at random with a fixed seed.

    Returns:
        The numbers, and the share of the users that they are of.
    """
    parts = [had[:, items] for had, _ in _training_items(dataset)]
    had = sparse.csr_array(sparse.vstack(parts, format="csr"))
    square = len(items) ** 2 <= _MOST_PAIRS
    chosen = _affordable(np.diff(had.indptr), _MOST_WORK if square else _MOST_PAIRS)
    share = float(chosen.mean()) if len(chosen) else 1.0
    common = sparse.csr_array(had[chosen].T @ had[chosen])
    if square:
        return common.toarray(), share
    common.sort_indices()
    return common, share


def _affordable(counts: Int[np.ndarray, " n"], most: int) -> Bool[np.ndarray, " n"]:
    """Which users can be counted: all, or some if that would be too much work."""
    work = counts.astype(np.float64) ** 2
    if work.sum() <= most:
        return np.ones(len(counts), bool)
    # A user with a great share of all items says little about which of them go together.
    work[work > most / 100] = np.inf
    order = np.random.default_rng(0).permutation(len(counts))
    order = order[np.isfinite(work[order])]
    chosen = np.zeros(len(counts), bool)
    chosen[order[np.cumsum(work[order]) <= most]] = True
    return chosen
