"""Metrics by slice of users: history length, last gap, popularity of the target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int, Int64

from tim4rec_jax.data import Dataset, train_item_counts
from tim4rec_jax.evaluation.loop import Split
from tim4rec_jax.evaluation.metrics import KS, metrics, standard_errors

SLICES = ("length", "gap", "popularity")
_UNITS = ((86400, " d"), (3600, " h"), (60, " min"), (1, " s"))


def sliced_metrics(
    ds: Dataset,
    split: Split,
    ranks: Int[np.ndarray, " n_users"],
    by: str,
    *,
    ks: Sequence[int] = KS,
    bins: int = 5,
) -> list[dict]:
    """Metrics of groups of about equally many users.

    Args:
        ds: the dataset that was evaluated.
        split: the split that was evaluated.
        ranks: as `tim4rec_jax.evaluation.evaluate` returns them; 0 = user without a target.
        by: `"length"` of the whole history before the target, in events; `"gap"` between the
            last two events before the target, the last the model sees, in seconds; or
            `"popularity"` of the target: its number of training events.
        ks: cut-offs.
        bins: at most so many groups; fewer where many users share a value.

    Returns:
        By rising value, per group: `bin` (its range, both ends included), `users`, `metrics`
        and `standard_errors`. Users with a single event before the target have no gap and
        are a group of their own.
    """
    users = np.flatnonzero(ranks)
    ranks = ranks[users]
    values = {"length": _lengths, "gap": _gaps, "popularity": _popularities}[by](ds, split, users)
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


def _targets(ds: Dataset, split: Split, users: Int64[np.ndarray, " U"]):
    starts = ds.offsets[users] + getattr(ds.splits, split)[users]
    return ds.items(starts, np.ones(len(users), np.int64), 1)[:, 0]
