"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

ROUTES = ("/", "/health", "/metrics", "/v1/models", "/v1/images/generations", "/v1/images/edits", "/v1/plans")
_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Numbers of one server.

    Args:
        waiting: how many requests wait or run.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.answers = Counter("bifrost_answers", "HTTP answers", ["route", "status"], registry=self.registry)
        self.images = Counter("bifrost_images", "Images made", registry=self.registry)
        self.jobs = Histogram(
            "bifrost_job_seconds",
            "Seconds that the pipeline worked for a request",
            ["ended"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        queue = Gauge("bifrost_queue", "Requests that wait or run", registry=self.registry)
        queue.set_function(waiting)

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        self.answers.labels(path if path in ROUTES else "other", status).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self.registry)
