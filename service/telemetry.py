"""The service's metrics, in a registry of their own: two apps in one process do not clash.

Labels come from closed sets alone: whatever clients send, the number of series stays what it is.
"""

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from service.device_worker import Memory
from service.drift import Drift
from service.errors import IMAGE_ERRORS

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
STAGES = ("receive", "wait", "decode", "queue", "device", "encode")
NO_ANSWER = "none"  # status class where the client left before an answer

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# Good images are near 0 with deviation 1; drift shows in between, defects far above. Negative values leave the
# histogram without a _sum, which would not only rise.
SCORE_BUCKETS = (-2, -1, 0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 7, 10, 20, 50, 100)
BATCH_BUCKETS = (1, 2, 4, 8, 16)
P_VALUE_BUCKETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


def package_version() -> str:
    """The installed version; "unknown" where the source runs without being installed."""
    try:
        return version("hazelnut")
    except PackageNotFoundError:
        return "unknown"


class Telemetry:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "hazelnut_requests_total",
            "Requests by route template, method and status class.",
            ["route", "method", "status_class"],
            registry=self.registry,
        )
        self._request_seconds = Histogram(
            "hazelnut_request_seconds",
            "Seconds from a request's headers to the last byte of its answer, the upload included; refusals left out.",
            ["route"],
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )
        self._failed = Counter(
            "hazelnut_requests_failed_total",
            "Requests that the service failed: answered 5xx, refusals left out.",
            ["route"],
            registry=self.registry,
        )
        self._refused = Counter(
            "hazelnut_requests_refused_total",
            "Requests that were told to come back later: the service was full, starting or stopping.",
            ["route"],
            registry=self.registry,
        )
        self._images = Counter(
            "hazelnut_images_total",
            "Images scored, by model and verdict at the alpha of their request.",
            ["model", "verdict"],
            registry=self.registry,
        )
        self._image_errors = Counter(
            "hazelnut_image_errors_total", "Images that were not scored, by reason.", ["reason"], registry=self.registry
        )
        self._stage_seconds = Histogram(
            "hazelnut_stage_seconds",
            "Seconds in each stage: receive per request, decode, queue and encode per image, device per batch.",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self._anomaly_score = Histogram(
            "hazelnut_anomaly_score",
            "Anomaly scores, in standard deviations of good images.",
            ["model"],
            buckets=SCORE_BUCKETS,
            registry=self.registry,
        )
        self._p_value = Histogram(
            "hazelnut_p_value",
            "P-values; those of good parts are spread evenly over (0, 1].",
            ["model"],
            buckets=P_VALUE_BUCKETS,
            registry=self.registry,
        )
        self.batch_images = Histogram(
            "hazelnut_batch_images",
            "Images that went to the device together.",
            buckets=BATCH_BUCKETS,
            registry=self.registry,
        )
        self.images_waiting = Gauge(
            "hazelnut_images_waiting", "Images received and not yet scored.", registry=self.registry
        )
        self.images_waiting_limit = Gauge(
            "hazelnut_images_waiting_limit", "How many images may be waiting.", registry=self.registry
        )
        self.queue_age = Gauge(
            "hazelnut_queue_age_seconds", "How long the oldest image has waited for the device.", registry=self.registry
        )
        self._decoders_lost = Counter(
            "hazelnut_decoders_lost_total",
            "Decoding processes that were replaced because they died or took too long.",
            ["reason"],
            registry=self.registry,
        )
        self._device_lost = Counter(
            "hazelnut_device_processes_lost_total",
            "Processes of the device that died, or hung and were killed, and were replaced.",
            registry=self.registry,
        )
        self._drift = Gauge(
            "hazelnut_drift",
            "Kolmogorov-Smirnov distance of the last p-values from those of good parts; NaN before the first.",
            ["model"],
            registry=self.registry,
        )
        self._drift_images = Gauge(
            "hazelnut_drift_images",
            "Images that hazelnut_drift rests on, at most 1000.",
            ["model"],
            registry=self.registry,
        )
        self._calibration_images = Gauge(
            "hazelnut_calibration_images",
            "Held-out good images that the p-values of the version that answers count.",
            ["model"],
            registry=self.registry,
        )
        self._model_version = Gauge(
            "hazelnut_model_version", "The version that answers.", ["model"], registry=self.registry
        )
        self._models_refused = Counter(
            "hazelnut_models_refused_total", "Versions on disk that could not be served.", registry=self.registry
        )
        self._device_memory = Gauge(
            "hazelnut_device_memory_bytes",
            "Memory in use on the device, by whatever process; on a CPU, of the process that scores.",
            registry=self.registry,
        )
        self._device_memory_limit = Gauge(
            "hazelnut_device_memory_limit_bytes",
            "The device's memory; on a CPU, what the container may use, or the machine's.",
            registry=self.registry,
        )
        self._build = Info("hazelnut_build", "What is running.", registry=self.registry)
        ProcessCollector(registry=self.registry)
        for stage in STAGES:
            self._stage_seconds.labels(stage)
        for reason in IMAGE_ERRORS:
            self._image_errors.labels(reason)
        for reason in ("died", "slow"):
            self._decoders_lost.labels(reason)

    def running_on(self, device: torch.device) -> None:
        self._build.info({"version": package_version(), "torch": torch.__version__, "device": str(device)})

    def device_has(self, memory: Memory) -> None:
        for gauge, size in zip((self._device_memory, self._device_memory_limit), memory, strict=True):
            gauge.set(size)

    def route_begins(self, route: str, method: str) -> None:
        """Let the route's series begin at zero: a rate needs the sample before the first failure."""
        for status_class in ("2xx", "4xx", "5xx", NO_ANSWER):
            self._requests.labels(route, method, status_class)
        self._request_seconds.labels(route)
        self._failed.labels(route)
        self._refused.labels(route)

    def model_answers(self, name: str, *, version: int, drift: Drift) -> None:
        """Let the model's series begin at zero: a rate needs the sample before the first image."""
        for verdict in ("normal", "anomalous"):
            self._images.labels(name, verdict)
        self._anomaly_score.labels(name)
        self._p_value.labels(name)
        self._model_version.labels(name).set(version)
        self._calibration_images.labels(name).set(drift.calibration_images)
        self._drift.labels(name).set_function(drift.distance)
        self._drift_images.labels(name).set_function(drift.images)

    def model_gone(self, name: str) -> None:
        """What was true of the model at a moment is true no more; what has been counted stays counted."""
        for gauge in (self._model_version, self._calibration_images, self._drift, self._drift_images):
            gauge.remove(name)

    def model_refused(self) -> None:
        self._models_refused.inc()

    def device_lost(self) -> None:
        self._device_lost.inc()

    def decoder_lost(self, reason: str) -> None:
        """reason: died or slow."""
        self._decoders_lost.labels(reason).inc()

    def request_ended(self, route: str, method: str, *, status: int | None, seconds: float | None) -> None:
        """route: a template, never a path. status: None where the client left before an answer. seconds: None of one
        that was refused: that takes next to nothing, and in an overload it would be the median.
        """
        method = method if method in METHODS else "other"
        status_class = NO_ANSWER if status is None else f"{status // 100}xx"
        self._requests.labels(route, method, status_class).inc()
        refused = seconds is None
        if seconds is not None:
            self._request_seconds.labels(route).observe(seconds)
        self._refused.labels(route).inc(refused)
        self._failed.labels(route).inc(status is not None and status >= 500 and not refused)

    def image_scored(self, model: str, *, anomaly_score: float, p_value: float, is_anomalous: bool) -> None:
        self._images.labels(model, "anomalous" if is_anomalous else "normal").inc()
        self._anomaly_score.labels(model).observe(anomaly_score)
        self._p_value.labels(model).observe(p_value)

    def image_refused(self, reason: str) -> None:
        self._image_errors.labels(reason).inc()

    def stage(self, name: str) -> Histogram:
        """A stage's histogram; `with telemetry.stage("decode").time():` observes the block."""
        return self._stage_seconds.labels(name)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the text format that the header Accept prefers, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(_WithoutCreated(self.registry)), media_type


class _WithoutCreated(Collector):
    """Leaves out the client's `_created` series, one for every counter and histogram: Prometheus has no use for them.

    The client's own switch holds for the whole process, other apps included.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


def route_template(matched: object, path: str, pages: Iterable[str]) -> str:
    """The label `route`: the matched route's template, one of the framework's own pages, or "unmatched"."""
    template = getattr(matched, "path", None)
    if isinstance(template, str):
        return template
    return path if path in pages else "unmatched"
