"""Hit, NDCG and MRR at k for one relevant item per user, from its rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int

KS = (10, 20, 50)


def per_user(
    ranks: Int[np.ndarray, " U"], ks: Sequence[int] = KS
) -> dict[str, Float64[np.ndarray, " U"]]:
    """What each user contributes: `hit@k`, `ndcg@k` and `mrr@k` for every k.

    With a single relevant item of rank r the ideal DCG is 1, so within the first k NDCG is
    1 / log2(r + 1) and MRR is 1 / r; beyond, all three are 0.

    Args:
        ranks: rank of each user's target, 1 = best.
        ks: cut-offs.
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
    """Means over users of `per_user`, unrounded."""
    return {name: float(values.mean()) for name, values in per_user(ranks, ks).items()}


def standard_errors(ranks: Int[np.ndarray, " U"], ks: Sequence[int] = KS) -> dict[str, float]:
    """Standard errors of `metrics`, users taken as the sample; 0 for a single user."""
    root = max(len(ranks) - 1, 1) ** 0.5
    return {name: float(values.std() / root) for name, values in per_user(ranks, ks).items()}
