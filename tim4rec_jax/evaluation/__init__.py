"""Full-ranking evaluation: ranks, metrics, slices, reports, predictions."""

from tim4rec_jax.evaluation.evaluate import evaluate
from tim4rec_jax.evaluation.metrics import metrics, standard_errors
from tim4rec_jax.evaluation.ranking import ranks, top_k

__all__ = ["evaluate", "metrics", "ranks", "standard_errors", "top_k"]
