"""The counters and histograms that the HTTP service shows to Prometheus."""

import functools

from prometheus_client import CollectorRegistry, Counter, Histogram

from tim4rec_jax.serving.recommender import Recommendations

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters and histograms of one service.

    Attributes:
        registry: holds all of them.
        batch: a histogram of the number of histories computed at once.
        events: a counter of the events told by callers; its label says whether the model knows
            the item.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "tim4rec_requests", "HTTP requests.", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "tim4rec_request_seconds",
            "Time from a request's header to the end of its answer.",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        # To find a counter by its labels takes longer than to count.
        self._counter = functools.cache(
            lambda path, status: self._requests.labels(path, str(status))
        )
        self._timer = functools.cache(lambda path: self._seconds.labels(path))
        self.batch = Histogram(
            "tim4rec_batch_size",
            "Histories computed at once.",
            buckets=_SIZES,
            registry=self.registry,
        )
        self.events = Counter(
            "tim4rec_events", "Events told by callers.", ["item"], registry=self.registry
        )
        self._unknown = Counter(
            "tim4rec_history_events_unknown",
            "Events of histories left out because the model does not know their item.",
            registry=self.registry,
        )
        self._fallbacks = Counter(
            "tim4rec_fallbacks",
            "Answers with the most popular items, for want of a known event.",
            registry=self.registry,
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request by path and status, and the seconds it took by path."""
        self._counter(path, status).inc()
        self._timer(path).observe(seconds)

    def count(self, found: Recommendations) -> None:
        """Counts the unknown events of a request, and whether the answer is a fallback."""
        self._unknown.inc(found.unknown)
        self._fallbacks.inc(found.fallback)
