"""Figures for Prometheus. One registry per app, so that two apps in one process do not mix."""

from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from ml.datasets.labels import CLASS_NAMES
from ml.monitoring.batch_writer import LogState
from ml.serving.batcher import BatcherState
from ml.serving.hot_swap import Challenger, FollowerState
from ml.serving.router import RouterState

_STAGE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Timed(Protocol):
    """As `deploy.server.request_context.Stage`: a part of a request, and the seconds it took."""

    name: str
    seconds: float


class HasFollowerState(Protocol):
    """As `ml.serving.hot_swap.ChampionFollower`."""

    def state(self) -> FollowerState:
        """What it has done so far."""


class HasLogState(Protocol):
    """As `ml.monitoring.prediction_log.PredictionLog`."""

    def state(self) -> LogState:
        """Its counts."""


class HasBatcherState(Protocol):
    """As `ml.serving.batcher.Batcher`."""

    def state(self) -> BatcherState:
        """Its counts."""


class HasRouterState(Protocol):
    """As `ml.serving.router.Router`."""

    def state(self) -> RouterState:
        """Its counts."""


class ServerMetrics:
    """Counts requests and predictions; asks follower, batcher, router and logs for theirs when it is scraped."""

    def __init__(
        self,
        follower: HasFollowerState,
        batcher: HasBatcherState,
        router: HasRouterState,
        log: HasLogState,
        shadows: HasLogState | None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "cifar10_http_requests", "Requests answered.", ["route", "method", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "cifar10_http_request_duration_seconds",
            "From the request's headers to the reply's.",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._predictions = Counter(
            "cifar10_predictions", "Images predicted.", ["label", "version"], registry=self._registry
        )
        self._stages = Histogram(
            "cifar10_stage_duration_seconds",
            "Parts of a request: decode, predict (of that: queue and engine), log.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "cifar10_batch_images",
            "Images that were predicted together with one's own, the own included; one observation for each request.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self._registry,
        )
        # Children by their labels: to find one costs more than to count in it, and most requests find the same.
        self._requests_of = cache(self._requests.labels)
        self._seconds_of = cache(self._seconds.labels)
        self._stages_of = cache(self._stages.labels)
        self._predictions_of = lru_cache(maxsize=1000)(self._predictions.labels)
        self._registry.register(_States(follower, log))
        self._registry.register(_Queued(batcher))
        self._registry.register(_Challenged(follower, router, shadows))

    def observe(self, route: str, method: str, status: int, seconds: float, stages: Iterable[Timed] = ()) -> None:
        """One request answered, and the parts of it that were timed."""
        self._requests_of(route, method, str(status)).inc()
        self._seconds_of(route).observe(seconds)
        for stage in stages:
            self._stages_of(stage.name).observe(stage.seconds)

    def refused(self, status: int) -> None:
        """One request refused before it reached a route: its body did not come, or there was no room for it."""
        self._requests_of("none", "", str(status)).inc()

    def predicted(self, class_ids: list[int], version: int, batch: int) -> None:
        """Images of one request predicted by one version, in a batch of that size."""
        self._batches.observe(batch)
        for class_id in class_ids:
            self._predictions_of(CLASS_NAMES[class_id], str(version)).inc()

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _States:
    """A collector: reads the two states at the moment of the scrape."""

    def __init__(self, follower: HasFollowerState, log: HasLogState) -> None:
        self._follower = follower
        self._log = log

    def describe(self) -> list[Metric]:
        """Nothing: keeps prometheus_client from collecting at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures."""
        follower, log = self._follower.state(), self._log.state()
        model = follower.model
        if model is not None:
            info = {"name": model.name, "version": str(model.version), "alias": model.alias, "data": model.data}
            yield InfoMetricFamily("cifar10_model", "The model that answers.", value=info)
        ready = GaugeMetricFamily("cifar10_model_loaded", "1 where a champion is loaded.", value=model is not None)
        yield ready
        yield CounterMetricFamily(
            "cifar10_model_swaps", "Champions taken into service, the first included.", value=follower.swaps
        )
        yield CounterMetricFamily(
            "cifar10_model_swap_failures", "Champions that could not be loaded.", value=follower.failed_swaps
        )
        failing = float(follower.failure is not None)
        yield GaugeMetricFamily(
            "cifar10_model_failing",
            "1 where the registry cannot be asked for the champion, or it cannot be loaded.",
            value=failing,
        )
        yield from _log_figures("cifar10_prediction_log", log)


class _Queued:
    """A collector: what waits for the engine."""

    def __init__(self, batcher: HasBatcherState) -> None:
        self._batcher = batcher

    def describe(self) -> list[Metric]:
        """Nothing: keeps prometheus_client from collecting at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures."""
        state = self._batcher.state()
        yield GaugeMetricFamily("cifar10_queue_images", "Images that wait for the engine.", value=state.queued)
        yield GaugeMetricFamily("cifar10_lanes_busy", "Cores that predict.", value=state.running)
        yield GaugeMetricFamily(
            "cifar10_seconds_per_image", "Of all cores together, of late: a queue's length in time.", value=state.pace
        )
        refused = CounterMetricFamily(
            "cifar10_refused_requests", "Requests refused with 503, as too many waited.", labels=["reason"]
        )
        for reason, count in state.refused.items():
            refused.add_metric([reason], count)
        yield refused


class _Challenged:
    """A collector: what the challenger gets and what came of it."""

    def __init__(self, follower: HasFollowerState, router: HasRouterState, shadows: HasLogState | None) -> None:
        self._follower = follower
        self._router = router
        self._shadows = shadows

    def describe(self) -> list[Metric]:
        """Nothing: keeps prometheus_client from collecting at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The figures."""
        follower, router = self._follower.state(), self._router.state()
        yield from _share(follower.challenger)
        yield CounterMetricFamily(
            "cifar10_challenger_load_failures",
            "Loads of a challenger that failed.",
            value=follower.failed_challengers,
        )
        for name, said in _COUNTED.items():
            family = CounterMetricFamily(f"cifar10_challenger_{name}_images", said, labels=["version"])
            for version, counts in router.counts.items():
                family.add_metric([str(version)], getattr(counts, name))
            yield family
        yield GaugeMetricFamily("cifar10_mirror_queued_images", "Images that wait to be mirrored.", value=router.queued)
        if self._shadows is not None:
            yield from _log_figures("cifar10_shadow_log", self._shadows.state())


_COUNTED = {
    "answered": "Images of callers that the challenger answered.",
    "mirrored": "Images that the challenger was shown unseen.",
    "disagreed": "Mirrored images on which it said another class than the champion.",
    "failed": "Images on which the challenger failed.",
    "dropped": "Images not mirrored because the queue was full.",
}


def _share(challenger: Challenger | None) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "cifar10_challenger_share", "Share of the requests that a loaded challenger gets.", labels=["version", "mode"]
    )
    if challenger is not None and challenger.model is not None and challenger.traffic is not None:
        traffic = challenger.traffic
        family.add_metric([str(traffic.version), traffic.mode], traffic.share)
    yield family
    failing = challenger is not None and challenger.failure is not None
    yield GaugeMetricFamily(
        "cifar10_challenger_failing", "1 where traffic is meant for a challenger and something is wrong.", value=failing
    )


def _log_figures(name: str, log: LogState) -> Iterator[Metric]:
    yield GaugeMetricFamily(f"{name}_queued_rows", "Rows that wait for the database.", value=log.queued)
    yield CounterMetricFamily(f"{name}_written_rows", "Rows in the database.", value=log.written)
    yield CounterMetricFamily(f"{name}_dropped_rows", "Rows lost: no room for them.", value=log.dropped)
    yield CounterMetricFamily(f"{name}_refused_rows", "Rows kept aside: PostgreSQL refuses them.", value=log.refused)
    yield CounterMetricFamily(f"{name}_damaged_places", "Places in the spool that held no record.", value=log.damaged)
    yield CounterMetricFamily(
        f"{name}_unspooled_rows", "Rows that waited in memory: the disk took none.", value=log.unspooled
    )
    yield GaugeMetricFamily(f"{name}_spool_bytes", "Bytes on disk that wait for the database.", value=log.spool_bytes)
    yield GaugeMetricFamily(f"{name}_spool_limit_bytes", "As many may wait there.", value=log.spool_limit)
    yield GaugeMetricFamily(f"{name}_spool_up", "1 where the disk took the last record.", value=log.spool_ok)
    yield GaugeMetricFamily(f"{name}_database_up", "1 where the last write went well.", value=log.database_ok)
