"""What the server counts, in Prometheus's text format."""

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Bounds of the buckets of times."""


class Metrics:
    """The counts of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Begin at zero.

        Args:
            running: how many texts are being generated.
            waiting: how many texts wait for a place.
        """
        disable_created_metrics()
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory and time of the processor, on Linux
        self.requests = Counter(
            "mmrec_requests",
            "Requests that were answered.",
            ("path", "status"),
            registry=self._registry,
        )
        self.cancelled = Counter(
            "mmrec_cancelled_requests",
            "Requests whose client left before the end.",
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "mmrec_prompt_tokens", "Tokens of prompts.", registry=self._registry
        )
        self.generated_tokens = Counter(
            "mmrec_generated_tokens", "Tokens that were generated.", registry=self._registry
        )
        self.first_token = Histogram(
            "mmrec_time_to_first_token_seconds",
            "Time from a request to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "mmrec_request_seconds",
            "Time from a request to its last token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        for name, text, function in (
            ("mmrec_running_texts", "Texts that are being generated.", running),
            ("mmrec_waiting_texts", "Texts that wait for a place.", waiting),
        ):
            Gauge(name, text, registry=self._registry).set_function(function)

    def to_text(self) -> bytes:
        """All counts, as Prometheus reads them."""
        return generate_latest(self._registry)
