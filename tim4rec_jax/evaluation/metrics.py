"""Hit, NDCG and MRR at k: means over all users, their standard errors, and means over groups.

Every user has one relevant item, the target, and its rank decides everything.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Int64

from tim4rec_jax.data import Dataset, train_item_counts
from tim4rec_jax.data.splits import Split

KS = (10, 20, 50)
SLICES = ("length", "gap", "popularity", "known")
_UNITS = ((86400, " d"), (3600, " h"), (60, " min"), (1, " s"))


def per_user(
    ranks: Int[np.ndarray, " U"], ks: Sequence[int] = KS
) -> dict[str, Float64[np.ndarray, " U"]]:
    """The `hit@k`, `ndcg@k` and `mrr@k` of each user, for every k.

    A target of rank r <= k has a hit of 1, an NDCG of 1 / log2(r + 1), because the ideal DCG of a
    single relevant item is 1, and an MRR of 1 / r. All three are 0 for a target of rank r > k.

    Args:
        ranks: the rank of each user's target, 1 for the best.
        ks: the cut-offs k.
    """
    gains = {
        "hit": np.ones(ranks.shape),
        "ndcg": 1 / np.log2(ranks + 1.0),
        "mrr": 1 / ranks.astype(np.float64),
    }
    return {
        f"{name}@{k}": np.where(ranks <= k, gain, 0.0) for name, gain in gains.items() for k in ks
    }


def metrics(ranks: Int[np.ndarray, " U"], ks: Sequence[int] = KS) -> dict[str, float]:
    """The means over users of `per_user`, not rounded."""
    return {name: float(values.mean()) for name, values in per_user(ranks, ks).items()}


def standard_errors(ranks: Int[np.ndarray, " U"], ks: Sequence[int] = KS) -> dict[str, float]:
    """The standard errors of `metrics`, with users as the sample; 0 for a single user."""
    root = max(len(ranks) - 1, 1) ** 0.5
    return {name: float(values.std() / root) for name, values in per_user(ranks, ks).items()}


def sliced_metrics(
    ds: Dataset,
    split: Split,
    ranks: Int[np.ndarray, " n_users"],
    by: str,
    *,
    ks: Sequence[int] = KS,
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
        bins: the largest number of groups; there are fewer where many users share a value.

    Returns:
        The groups by rising value, each with `bin` (its range, both ends included), `users`,
        `metrics` and `standard_errors`. Users with a single event before the target have no gap
        and are a group of their own, the first.
    """
    users = np.flatnonzero(ranks)
    ranks = ranks[users]
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
    return [
        {
            "bin": label,
            "users": int(members.sum()),
            "metrics": metrics(ranks[members], ks),
            "standard_errors": standard_errors(ranks[members], ks),
        }
        for label, members in groups
    ]


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
