"""What the server counts, as Prometheus text."""

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from moe_jax.engine.loop import Load

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server; several servers in one process do not mix."""

    def __init__(self):
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

        def make(kind, name, text, **more):
            return kind(f"moe_jax_{name}", text, registry=self._registry, **more)

        self.requests: Counter = make(
            Counter, "requests", "Answers by route and status", labelnames=("route", "status")
        )
        self.vanished: Counter = make(
            Counter, "clients_vanished", "Clients that left before their answer was complete"
        )
        self.prompt_tokens: Counter = make(
            Counter, "prompt_tokens", "Tokens of the prompts of finished sequences"
        )
        self.cached_tokens: Counter = make(
            Counter, "cached_prompt_tokens", "Prompt tokens that were found in the KV cache"
        )
        self.generated_tokens: Counter = make(
            Counter, "generated_tokens", "Tokens generated, of unfinished sequences too"
        )
        self.first_token: Histogram = make(
            Histogram,
            "time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
        )
        self.latency: Histogram = make(
            Histogram,
            "request_seconds",
            "From a request's arrival to its last token",
            buckets=_SECONDS,
        )
        self._running: Gauge = make(Gauge, "requests_running", "Requests that run now")
        self._waiting: Gauge = make(Gauge, "requests_waiting", "Requests that wait to run")
        self._free: Gauge = make(Gauge, "kv_pages_free", "KV pages that are free")
        self._pages: Gauge = make(Gauge, "kv_pages", "KV pages")

    def text(self, load: Load) -> bytes:
        """Everything counted so far, and the engine's load as it is now."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._free.set(load.free_pages)
        self._pages.set(load.pages)
        return generate_latest(self._registry)
