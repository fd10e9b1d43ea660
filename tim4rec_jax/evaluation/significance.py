"""Whether models differ by more than chance."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy import stats


def paired_p_values(gains: Mapping[str, Float[np.ndarray, " U"]]) -> dict[str, float]:
    """Compares a figure of each model with that of the first one, user by user.

    The test is a paired t-test over users. Holm's method (1979) corrects the p values for the
    number of models.

    Args:
      gains: the figure of each user, such as NDCG@10, by the name of the model. All models have the
        same users in the same order.

    Returns:
      The corrected p value of each model but the first. It is 1 where no user differs, or where
      there is one user.
    """
    (_, first), *others = gains.items()
    raw = {}
    for name, own in others:
        difference, raw[name] = own - first, 1.0
        if difference.any() and len(difference) > 1:
            _, raw[name] = map(float, stats.ttest_1samp(difference, 0))
    corrected, largest = {}, 0.0
    for place, name in enumerate(sorted(raw, key=lambda name: raw[name])):
        largest = max(largest, min(1.0, raw[name] * (len(raw) - place)))
        corrected[name] = largest
    return corrected
