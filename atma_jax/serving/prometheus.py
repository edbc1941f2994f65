"""The server's metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from atma_jax.serving.connections import Connections
from atma_jax.serving.engine_thread import EngineThread

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # bounds of the histograms' buckets

_compilations = 0


def _count_compilations(event: str, duration_secs: float, **details: Any) -> None:
  del duration_secs, details
  global _compilations
  _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


def compilations() -> int:
  """Returns the number of programs that JAX has compiled in this process since this module was imported."""
  return _compilations


class ServerMetrics(Collector):
  """The metrics of one server, in a registry of their own.

  Attributes:
    requests: completion requests answered, by status; a stream counts by how it ended.
    prompt_tokens: tokens of accepted prompts.
    completion_tokens: tokens of answers.
    first_token: histogram of the seconds from a request's arrival to its first token.
    whole_answer: histogram of the seconds from a request's arrival to the end of its answer.
  """

  def __init__(self, thread: EngineThread, connections: Connections):
    self._registry = registry = prometheus_client.CollectorRegistry()
    self._thread, self._connections = thread, connections
    self.requests = prometheus_client.Counter("requests", "Completion requests answered, by status; 499 left.", ["status"],
                                              namespace="atma", registry=registry)
    self.prompt_tokens = prometheus_client.Counter("prompt_tokens", "Tokens of accepted prompts.", namespace="atma",
                                                   registry=registry)
    self.completion_tokens = prometheus_client.Counter("completion_tokens", "Tokens of answers.", namespace="atma",
                                                       registry=registry)
    self.first_token = prometheus_client.Histogram("time_to_first_token_seconds", "From a request's arrival.", buckets=SECONDS,
                                                   namespace="atma", registry=registry)
    self.whole_answer = prometheus_client.Histogram("request_seconds", "From arrival to the end of the answer.", buckets=SECONDS,
                                                    namespace="atma", registry=registry)
    registry.register(self)

  def collect(self) -> Iterator[Metric]:
    """Yields what the engine holds at this moment."""
    engine = self._thread.engine
    sequences = GaugeMetricFamily("atma_sequences", "Sequences in the engine, by what they do.", labels=["state"])
    for state, count in engine.counts.items():
      sequences.add_metric([state], count)
    yield sequences
    yield GaugeMetricFamily("atma_rows", "Sequences that can decode at once.", engine.rows)
    if engine.pages is not None:
      yield GaugeMetricFamily("atma_pages", "Pages of keys and values.", engine.pages.total)
      yield GaugeMetricFamily("atma_free_pages", "Pages that no request holds.", engine.pages.free)
    yield GaugeMetricFamily("atma_outstanding", "Sequences not answered yet.", len(self._thread.outstanding))
    yield GaugeMetricFamily("atma_connections", "Open connections.", len(self._connections.open))
    refused = CounterMetricFamily("atma_ended_connections", "Connections ended by the server, by reason.", labels=["reason"])
    for reason, count in sorted(self._connections.refused.items()):
      refused.add_metric([reason], count)
    yield refused
    yield CounterMetricFamily("atma_prefilled_tokens", "Prompt tokens computed, not taken from a kept prefix.", engine.prefilled)
    yield CounterMetricFamily("atma_compilations", "Programs compiled; serving compiles none.", compilations())

  def exposition(self) -> bytes:
    """Returns all metrics in Prometheus' text format, whose media type is `CONTENT_TYPE`."""
    return prometheus_client.generate_latest(self._registry)
