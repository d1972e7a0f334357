"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lm_zoo.serving.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, and the state of its engine when they are read."""

    def __init__(self, engine: Engine, paths: set[str]):
        self.engine = engine
        self.paths = paths
        self.registry = CollectorRegistry()
        options = {"registry": self.registry}
        self.requests = Counter("lm_zoo_requests", "HTTP requests answered", ["path", "status"], **options)
        self.first_token = Histogram(
            "lm_zoo_first_token_seconds", "from a request to its first token", buckets=SECONDS, **options
        )
        self.seconds = Histogram(
            "lm_zoo_request_seconds", "from a request to the end of its answer", buckets=SECONDS, **options
        )
        self.registry.register(self)

    def count(self, path: str, status: int) -> None:
        self.requests.labels(path if path in self.paths else "other", str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        engine = self.engine
        yield GaugeMetricFamily("lm_zoo_texts_running", "texts being read or written", value=engine.running)
        yield GaugeMetricFamily("lm_zoo_texts_waiting", "texts waiting", value=engine.waiting)
        yield CounterMetricFamily("lm_zoo_prompt_tokens", "tokens of prompts taken in", value=engine.prompt_tokens)
        yield CounterMetricFamily("lm_zoo_written_tokens", "tokens written", value=engine.written_tokens)
        yield CounterMetricFamily("lm_zoo_steps", "steps of all texts being written", value=engine.steps)
        finished = CounterMetricFamily("lm_zoo_texts_finished", "texts finished, by the reason", labels=["reason"])
        for reason, count in list(engine.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        if engine.prefix_store is not None:
            found = engine.prefix_store.tokens_found
            yield CounterMetricFamily("lm_zoo_prefix_tokens_found", "tokens of prompts that were known", value=found)

    def page(self) -> bytes:
        return generate_latest(self.registry)
