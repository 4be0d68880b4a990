"""Counters for Prometheus, through its client library (``pip install 'fx_instrument[serve]'``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry

from ..serving import RecorderReport

_COUNTERS = {
    "steps": "Forward calls of the model that were recorded",
    "records": "Captured values handed to the writer",
    "raw_bytes": "Bytes of the captured values, uncompressed",
    "stored_bytes": "Bytes written to files",
    "dropped_records": "Captured values that found no room in the buffer",
    "dropped_inputs": "Forward calls whose integer inputs found no room in the buffer",
    "stalled_seconds": "Seconds that forward calls waited for the buffer, over all threads",
    "eager_records": "Captured values of modules that ran outside compiled graphs",
    "files": "Files that were begun",
    "failures": "How often a failure switched recording off, or kept it off",
}


class Reporting(Protocol):
    """A ``Recorder``, or what writes the files of an engine's capture."""

    @property
    def report(self) -> RecorderReport: ...


class RecorderCollector(Collector):
    """Reads ``recorder.report`` whenever Prometheus scrapes; counts go on over files, stops and starts.

        REGISTRY.register(RecorderCollector(recorder))

    The names are ``fx_instrument_records_total``, ``fx_instrument_raw_bytes_total`` and so on for every count of
    ``RecorderReport``, and the gauge ``fx_instrument_recording`` (1 while forward calls are recorded).

    Args:
        recorder: whose counters.
        labels: fixed labels, to tell several recorders in one registry apart.
    """

    def __init__(self, recorder: Reporting, labels: dict[str, str] | None = None) -> None:
        self._recorder = recorder
        self._names = tuple(labels or {})
        self._values = tuple((labels or {}).values())

    def collect(self) -> Iterator[Metric]:
        report = self._recorder.report
        for name, help_text in _COUNTERS.items():
            counter = CounterMetricFamily(f"fx_instrument_{name}", help_text, labels=self._names)
            counter.add_metric(self._values, float(getattr(report, name)))
            yield counter
        active = GaugeMetricFamily(
            "fx_instrument_recording", "1 while forward calls are recorded, else 0", labels=self._names
        )
        active.add_metric(self._values, float(report.active))
        yield active


def register(recorder: Reporting, registry: CollectorRegistry = REGISTRY, **labels: str) -> RecorderCollector:
    """Have ``registry`` expose the counters of ``recorder``; the collector, for ``registry.unregister``."""
    collector = RecorderCollector(recorder, labels)
    registry.register(collector)
    return collector


def serve(recorder: Reporting, port: int, address: str = "127.0.0.1", **labels: str) -> int:
    """Serve the counters of ``recorder``, and no others, at ``http://address:port/metrics``, until the process ends.

    Args:
        port: 0 takes one that is free.

    Returns:
        The port.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    registry = CollectorRegistry()
    register(recorder, registry, **labels)
    try:
        server, _ = start_http_server(port, address, registry)
    except OSError as error:
        raise OSError(
            error.errno,
            f"metrics can't be served at {address}:{port} ({error.strerror}): name another metrics_port",
        ) from error
    return int(server.server_port)
