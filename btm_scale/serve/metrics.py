"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from btm_scale.serve.work import Backend

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, backend: Backend) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("btm_scale_requests", "Requests.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "btm_scale_request_seconds",
            "Time to the end of the answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "btm_scale_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("btm_scale_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.tokens = Counter("btm_scale_generated_tokens", "Tokens generated.", ["model"], registry=registry)
        self.drawn = Counter(
            "btm_scale_texts", "Texts by the expert that generated them.", ["expert"], registry=registry
        )
        self.hang_ups = Counter("btm_scale_hang_ups", "Requests whose client left.", registry=registry)
        registry.register(_Load(backend))

    def text(self) -> bytes:
        """Return all of them."""
        return generate_latest(self._registry)


class _Load:
    """How many texts are running and waiting, asked when metrics are read."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        """Yield the gauge."""
        gauge = GaugeMetricFamily("btm_scale_load", "Texts that are running or waiting.", labels=["state"])
        for state, count in self._backend.load().items():
            gauge.add_metric([state], count)
        yield gauge
