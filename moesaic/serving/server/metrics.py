"""What Prometheus reads at /metrics. Names begin with `moesaic_`; docs/serving.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moesaic.serving.engine.request import EngineStatistics

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

GAUGES = {
    "running": "answers that are being computed",
    "waiting": "answers that wait for a place",
    "blocks": "blocks of the key-value cache",
    "blocks_used": "blocks that answers hold",
    "blocks_cached": "blocks kept for prompts that begin alike",
    "blocks_free": "blocks that hold nothing",
    "last_step_seconds": "time of the last step",
}
COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts found in the cache",
    "computed_tokens": "positions that went through the model",
    "generated_tokens": "tokens that were chosen",
    "preemptions": "answers that lost their blocks and were computed again",
    "steps": "steps of the engine",
    "executor_seconds": "time in which the model computed",
    "engine_seconds": "time for scheduling, sampling and text",
}


class Metrics:
    """Counts what the server does, and reads what the engine counts."""

    def __init__(self, statistics: Callable[[], EngineStatistics]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "moesaic_http_requests",
            "HTTP requests, by path and status",
            ["path", "status"],
            registry=self._registry,
        )
        self.request_seconds = self._histogram("request", "from a request to its answer's end")
        self.first_token_seconds = self._histogram(
            "first_token", "from a request to its first token"
        )
        self.token_seconds = self._histogram("token", "between tokens of an answer, its mean")
        self._registry.register(_OfEngine(statistics))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(
            f"moesaic_{name}_seconds", f"Seconds {what}", buckets=SECONDS, registry=self._registry
        )


class _OfEngine(Collector):
    def __init__(self, statistics: Callable[[], EngineStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        for name, what in GAUGES.items():
            yield GaugeMetricFamily(f"moesaic_{name}", what.capitalize(), getattr(now, name))
        for name, what in COUNTERS.items():
            yield CounterMetricFamily(f"moesaic_{name}", what.capitalize(), getattr(now, name))
        answers = CounterMetricFamily(
            "moesaic_answers", "Answers that ended, by reason", labels=["reason"]
        )
        for reason, count in now.finished.items():
            answers.add_metric([reason], count)
        yield answers
