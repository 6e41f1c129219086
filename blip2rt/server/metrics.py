"""What /metrics says, in Prometheus' format. Every server has a registry of its own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "blip2rt_requests", "Requests, by route and status", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "blip2rt_request_seconds", "From arrival to the last byte", ["route"], registry=registry
        )
        self.pictures = Counter("blip2rt_pictures", "Pictures answered", registry=registry)
        self.tokens = Counter("blip2rt_tokens", "Tokens generated, alternatives included", registry=registry)
        self.cancelled = Counter(
            "blip2rt_cancelled", "Pictures whose client left or whose time was up", registry=registry
        )
        self.batch = Histogram(
            "blip2rt_batch_pictures", "Pictures decoded together", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.waited = Histogram("blip2rt_queue_seconds", "Time that pictures waited", registry=registry)
        self.queue = Gauge("blip2rt_queue_pictures", "Pictures that wait", registry=registry)
        self.reloads = Counter(
            "blip2rt_reloads", "Engines opened while running, by outcome", ["outcome"], registry=registry
        )
