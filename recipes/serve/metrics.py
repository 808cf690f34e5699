"""Metrics in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily

from .batcher import Batcher


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What the requests got, and the state of the batch at the moment of asking."""

    def __init__(self, batcher: Batcher, name: str):
        self.batcher, self.registry = batcher, CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(
            "lavin_requests", "Chat requests by HTTP status (499: the client left)", ["status"], **own
        )
        self.seconds = Histogram("lavin_request_seconds", "Arrival to end", buckets=SECONDS, **own)
        self.first_token = Histogram("lavin_first_token_seconds", "Arrival to first token", buckets=SECONDS, **own)
        self.prompt_tokens = Counter("lavin_prompt_tokens", "Prompt tokens, image tokens among them", **own)
        self.images = Counter("lavin_images", "Images", **own)
        Gauge("lavin_running_rows", "Rows being decoded", **own).set_function(lambda: batcher.running)
        Gauge("lavin_waiting_rows", "Rows waiting for a place", **own).set_function(lambda: len(batcher.waiting))
        Info("lavin_model", "The model", **own).info({"name": name})
        self.registry.register(self)

    def collect(self):
        yield CounterMetricFamily("lavin_generated_tokens", "Generated tokens", self.batcher.generated)
        yield CounterMetricFamily("lavin_steps", "Decoding steps of the batch", self.batcher.steps)
