"""Hit, NDCG and MRR at k: means over all users, their standard errors, and means over groups.

Every user has one relevant item, the target, and its rank decides everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int, Int64

from tim4rec_jax.data import Dataset, train_item_counts
from tim4rec_jax.data.splits import Split

KS = (10, 20, 50)
Ties = Literal["optimistic", "expected"]  # see `per_user`
TIES: tuple[Ties, ...] = ("optimistic", "expected")
SLICES = ("length", "gap", "popularity", "known")
_UNITS = ((86400, " d"), (3600, " h"), (60, " min"), (1, " s"))


def per_user(
    ranks: Int[np.ndarray, " U"],
    ks: Sequence[int] = KS,
    ties: Int[np.ndarray, " U"] | None = None,
) -> dict[str, Float64[np.ndarray, " U"]]:
    """The `hit@k`, `ndcg@k` and `mrr@k` of each user, for every k.

    A target of rank r <= k has a hit of 1, an NDCG of 1 / log2(r + 1), because the ideal DCG of a
    single relevant item is 1, and an MRR of 1 / r. All three are 0 for a target of rank r > k.

    A target that t other items tie with can take the ranks r to r + t. Without `ties`, the figures
    are those of rank r: *optimistic*. With them, they are the means over the t + 1 ranks, which is
    what a random order among equals gives: *expected*.

    Args:
        ranks: the best rank of each user's target, 1 for the best.
        ks: the cut-offs k.
        ties: the number of other items with the score of each user's target.
    """
    gains = {"hit": np.ones_like, "ndcg": lambda r: 1 / np.log2(r + 1), "mrr": lambda r: 1 / r}
    best = ranks.astype(np.float64)
    found = {
        f"{name}@{k}": np.where(ranks <= k, gain(best), 0.0)
        for name, gain in gains.items()
        for k in ks
    }
    if ties is None or not ties.any():
        return found
    tied = np.flatnonzero(ties)
    above, places = ranks[tied].astype(np.int64) - 1, ties[tied].astype(np.int64) + 1
    worst = min(max(ks), int((above + places).max()))
    for name, gain in gains.items():
        # The sums of the gains of the ranks 1 to n, for every n.
        sums = np.append(0.0, np.cumsum(gain(np.arange(1.0, worst + 1))))
        for k in ks:
            last, before = np.minimum(above + places, k), np.minimum(above, k)
            total = sums[np.minimum(last, worst)] - sums[np.minimum(before, worst)]
            found[f"{name}@{k}"][tied] = total / places
    return found


def tested(
    ranks: Int[np.ndarray, " n_users"], ties: Int[np.ndarray, " n_users"], how: Ties
) -> tuple[Int[np.ndarray, " U"], Int[np.ndarray, " U"] | None]:
    """What `per_user` takes as `ranks` and `ties`: those of users with a target.

    Args:
        ranks: a rank for each user of a dataset, 0 for a user without a target.
        ties: likewise the number of other items with the score of the target.
        how: "optimistic" leaves the ties out.
    """
    users = ranks > 0
    return ranks[users], ties[users] if how == "expected" else None


def metrics(
    ranks: Int[np.ndarray, " U"],
    ks: Sequence[int] = KS,
    ties: Int[np.ndarray, " U"] | None = None,
) -> dict[str, float]:
    """The means over users of `per_user`, not rounded."""
    return {name: float(values.mean()) for name, values in per_user(ranks, ks, ties).items()}


def standard_errors(
    ranks: Int[np.ndarray, " U"],
    ks: Sequence[int] = KS,
    ties: Int[np.ndarray, " U"] | None = None,
) -> dict[str, float]:
    """The standard errors of `metrics`, with users as the sample; 0 for a single user."""
    root = max(len(ranks) - 1, 1) ** 0.5
    return {name: float(values.std() / root) for name, values in per_user(ranks, ks, ties).items()}


def sliced_metrics(
    ds: Dataset,
    split: Split,
    ranks: Int[np.ndarray, " n_users"],
    by: str,
    *,
    ks: Sequence[int] = KS,
    ties: Int[np.ndarray, " n_users"] | None = None,
    bins: int = 5,
) -> list[dict]:
    """The metrics of groups of users, with about equally many users in each group.

    Args:
        ds: the dataset that was evaluated.
        split: the split that was evaluated.
        ranks: the ranks that `tim4rec_jax.evaluation.evaluate` returns; 0 for a user without a
            target.
        by: what users are grouped by. `"length"` is the number of events in the whole history
            before the target. `"gap"` is the time between the last two events before the target,
            in seconds, which is the last gap that the model sees. `"popularity"` is the number of
            training events of the target. `"known"` is whether the target has any: an item
            without training events is new to the model.
        ks: the cut-offs k.
        ties: as for `per_user`, for the same users as `ranks`.
        bins: the largest number of groups; there are fewer where many users share a value.

    Returns:
        The groups by rising value, each with `bin` (its range, both ends included), `users`,
        `metrics` and `standard_errors`. Users with a single event before the target have no gap
        and are a group of their own, the first.
    """
    users = np.flatnonzero(ranks)
    ranks, ties = ranks[users], None if ties is None else ties[users]
    slices = {"length": _lengths, "gap": _gaps, "popularity": _popularities, "known": _known}
    values = slices[by](ds, split, users)
    groups = [("no gap", np.isnan(values))] if np.isnan(values).any() else []
    known = values[~np.isnan(values)]
    if known.size:
        cuts = np.unique(np.quantile(known, np.arange(1, bins) / bins, method="higher"))
        number = np.where(np.isnan(values), -1, np.searchsorted(cuts, values, side="right"))
        for group in np.unique(number[number >= 0]):
            members = number == group
            low, high = values[members].min(), values[members].max()
            groups.append((_label(low, high, by), members))
    found = []
    for label, members in groups:
        of_group = ranks[members], ks, None if ties is None else ties[members]
        figures = {"metrics": metrics(*of_group), "standard_errors": standard_errors(*of_group)}
        found.append({"bin": label, "users": int(members.sum())} | figures)
    return found


def _label(low: float, high: float, by: str) -> str:
    if by == "known":
        return "yes" if low else "no"
    text = _duration if by == "gap" else lambda value: (f"{value:,.0f}", "")
    (low_number, low_unit), (high_number, high_unit) = text(low), text(high)
    if (low_number, low_unit) == (high_number, high_unit):
        return f"{high_number}{high_unit}"
    return f"{low_number}{low_unit if low_unit != high_unit else ''} – {high_number}{high_unit}"


def _duration(seconds: float) -> tuple[str, str]:
    size, unit = next((size, unit) for size, unit in _UNITS if seconds >= size or size == 1)
    return f"{seconds / size:,.1f}".removesuffix(".0"), unit


def _lengths(ds: Dataset, split: Split, users: Int64[np.ndarray, " U"]):
    return getattr(ds.splits, split)[users].astype(np.float64)


def _gaps(ds: Dataset, split: Split, users: Int64[np.ndarray, " U"]) -> Float64[np.ndarray, " U"]:
    ends = getattr(ds.splits, split)[users]
    pair = ds.timestamps(ds.offsets[users] + np.maximum(ends - 2, 0), np.full(len(users), 2), 2)
    return np.where(ends >= 2, pair[:, 1] - pair[:, 0], np.nan)


def _popularities(ds: Dataset, split: Split, users: Int64[np.ndarray, " U"]):
    return train_item_counts(ds)[_targets(ds, split, users) - 1].astype(np.float64)


def _known(ds: Dataset, split: Split, users: Int64[np.ndarray, " U"]):
    return (_popularities(ds, split, users) > 0).astype(np.float64)


def _targets(ds: Dataset, split: Split, users: Int64[np.ndarray, " U"]):
    starts = ds.offsets[users] + getattr(ds.splits, split)[users]
    return ds.items(starts, np.ones(len(users), np.int64), 1)[:, 0]
