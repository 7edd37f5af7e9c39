"""Prometheus metrics of a service, under its own names and, where the meaning is the same, under vLLM's.

Numbers are read when they are asked for; nothing is counted twice and nothing is done per token here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from sparsejax.engine.timings import Buckets
from sparsejax.serve.service import Service, Status

GAUGES = {
    "num_running": "Sequences that run.",
    "num_waiting": "Sequences that wait for a row.",
    "kv_live_pages": "KV pages in use.",
    "kv_free_pages": "KV pages that are free, idle ones included.",
    "kv_idle_pages": "KV pages that nobody reads and the prefix cache keeps until they are needed.",
    "kv_kept_pages": "KV pages of conversations between their turns, each as often as conversations hold it.",
    "num_conversations": "Conversations that are kept or continued.",
    "kv_live_bytes": "KV bytes in use.",
    "kv_page_bytes": "Bytes of a KV page over all layers.",
}
"""What of `Engine.stats` goes up and down, beside `MEASURED` and `KV_BYTES`; everything else in it only grows."""

MEASURED = re.compile(r"recall_layer_\d+|(host|disk)_kv_live_pages|kv_page_\w+_seconds")
"""Means, sizes and costs that need no text of their own."""

KV_BYTES = (
    ("kv_tier_bytes", "tier", "KV bytes in use.", re.compile(r"(?:(host|disk)_)?kv_live_bytes"), "device"),
    ("kv_codec_bytes", "codec", "Bytes of KV pages in use on the device.", re.compile(r"kv_codec_(\w+)_bytes"), ""),
)
"""Metric, its label, text, what of `Engine.stats` it collects with the label's value, and the value of no match."""

SHARES = (
    ("pages_read_per_step", "KV pages that a decode step reads of a row.", "decode_pages_read", "decode_queries"),
    ("budget_cap_ratio", "Lists of `top_p` that fill their budget.", "lists_at_budget", "lists_by_top_p"),
    ("recall_fallback_ratio", "Checks of recall that made a row read everything.", "budgets_dropped", "recall_checks"),
)
"""Name, text, and what of `Engine.stats` is divided by what."""

KEPT = (
    ("sparse_read_ratio", "KV bytes that decode steps read over those they hold.", "read", "held"),
    ("sparse_held_ratio", "KV bytes that decode steps hold over those without evictions.", "held", "dense"),
)
"""The same of ``decode_*_bytes``, and 1 before anything is decoded."""

VLLM_COUNTERS = {
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "num_preemptions": "num_preemptions",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
}
"""Name in `Engine.stats` -> vLLM's name, without the prefix and ``_total``."""

HISTOGRAMS = {
    "first_token": ("time_to_first_token_seconds", "Arrival to first token."),
    "inter_token": ("inter_token_latency_seconds", "Time between tokens of one output."),
    "queue": ("request_queue_time_seconds", "Arrival to the first step."),
    "prefill": ("request_prefill_time_seconds", "First step to first token."),
    "decode": ("request_decode_time_seconds", "First token to the end."),
    "inference": ("request_inference_time_seconds", "First step to the end."),
    "total": ("e2e_request_latency_seconds", "Arrival to the end."),
    "per_token": ("request_time_per_output_token_seconds", "Decode time per output token, by request."),
    "prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request."),
    "generation_tokens": ("request_generation_tokens", "Tokens that a request generated."),
    "step_tokens": ("iteration_tokens_total", "Tokens computed by a step."),
}


class Metrics:
    """Collects from a service at each scrape.

    Args:
        model_name: the label that vLLM's dashboards select by.
        compatible: also export vLLM's names.
    """

    def __init__(self, service: Service, model_name: str, compatible: bool = True):
        self._service, self._labels = service, {"model_name": model_name, "engine": "0"}
        self._prefixes = ("sparsejax:", "vllm:") if compatible else ("sparsejax:",)
        self.requests: dict[tuple[str, int], int] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def count_request(self, route: str, status: int) -> None:
        """One HTTP or gRPC request has been answered."""
        self.requests[route, status] = self.requests.get((route, status), 0) + 1

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The metrics in the format that the scraper accepts, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        yield from self._service_metrics()
        stats = self._service.stats()
        if stats:
            yield from self._engine_metrics(stats)
            yield from self._histograms()

    def _service_metrics(self) -> Iterator[Metric]:
        service, admission = self._service, self._service.admission
        status = GaugeMetricFamily("sparsejax:status", "1 for the state the server is in.", labels=["status"])
        for one in Status:
            status.add_metric([one.value], float(service.status is one))
        yield status
        held = {"requests": admission.requests, "prompt_tokens": admission.prompt_tokens}
        for name, value in held.items():
            yield GaugeMetricFamily(f"sparsejax:admitted_{name}", f"Accepted {name}, queued or running.", value)
        rejected = CounterMetricFamily("sparsejax:rejected_requests", "Refused requests.", labels=["reason"])
        for reason, count in list(service.rejected.items()):
            rejected.add_metric([reason], count)
        yield rejected
        answered = CounterMetricFamily("sparsejax:http_requests", "Answers.", labels=["route", "status"])
        for (route, code), count in list(self.requests.items()):
            answered.add_metric([route, str(code)], count)
        yield answered

    def _engine_metrics(self, stats: dict[str, int | float]) -> Iterator[Metric]:
        for name, value in stats.items():
            if name in GAUGES or MEASURED.fullmatch(name):
                text = GAUGES.get(name, f"Engine gauge {name}.")
                yield self._one(GaugeMetricFamily, f"sparsejax:{name}", text, value)
            elif not any(pattern.fullmatch(name) for *_, pattern, _ in KV_BYTES):
                yield self._one(CounterMetricFamily, f"sparsejax:{name}", f"Engine counter {name}.", value)
        for metric, label, text, pattern, default in KV_BYTES:
            family = GaugeMetricFamily(f"sparsejax:{metric}", text, labels=[*self._labels, label])
            for name, value in stats.items():
                if found := pattern.fullmatch(name):
                    family.add_metric([*self._labels.values(), found[1] or default], value)
            yield family
        labels = [*self._labels, "component"]
        memory = GaugeMetricFamily("sparsejax:memory_bytes", "Bytes by component, in every tier.", labels=labels)
        for name, size in self._service.memory().items():
            if name != "total":
                memory.add_metric([*self._labels.values(), name], size)
        yield memory
        pages = stats["kv_live_pages"] + stats["kv_free_pages"]
        usage = stats["kv_live_pages"] / max(pages, 1)
        for name, text, part, whole in KEPT:
            part, whole = (stats[f"decode_{kind}_bytes"] for kind in (part, whole))
            yield self._one(GaugeMetricFamily, f"sparsejax:{name}", text, part / whole if whole else 1.0)
        for name, text, part, whole in SHARES:
            yield self._one(GaugeMetricFamily, f"sparsejax:{name}", text, stats[part] / max(stats[whole], 1))
        for prefix in self._prefixes:
            name, text = f"{prefix}kv_cache_usage_perc", "Share of KV pages in use, 0 to 1."
            yield self._one(GaugeMetricFamily, name, text, usage)
        if "vllm:" not in self._prefixes:
            return
        for ours, theirs in (("num_running", "running"), ("num_waiting", "waiting")):
            yield self._one(GaugeMetricFamily, f"vllm:num_requests_{theirs}", GAUGES[ours], stats[ours])
        for ours, theirs in VLLM_COUNTERS.items():
            if ours in stats:
                yield self._one(CounterMetricFamily, f"vllm:{theirs}", f"Engine counter {ours}.", stats[ours])
        sizes = {"block_size": str(self._service.config.page_size), "num_gpu_blocks": str(int(pages))}
        info = GaugeMetricFamily("vllm:cache_config_info", "Sizes.", labels=[*self._labels, *sizes])
        info.add_metric([*self._labels.values(), *sizes.values()], 1)
        yield info

    def _histograms(self) -> Iterator[Metric]:
        timings = self._service.timings()
        for prefix in self._prefixes:
            for name, (exported, text) in HISTOGRAMS.items():
                yield self._histogram(prefix + exported, text, getattr(timings, name))
            done = CounterMetricFamily(
                f"{prefix}request_success", "Outputs that ended.", labels=[*self._labels, "finished_reason"]
            )
            for reason, count in list(timings.finished.items()):
                done.add_metric([*self._labels.values(), reason], count)
            yield done

    def _one(self, family: type[Metric], name: str, text: str, value: float) -> Metric:
        metric = family(name, text, labels=list(self._labels))
        metric.add_metric(list(self._labels.values()), value)
        return metric

    def _histogram(self, name: str, text: str, buckets: Buckets) -> Metric:
        bounds = [*(str(bound) for bound in buckets.bounds), "+Inf"]
        counts = accumulate(list(buckets.counts))
        metric = HistogramMetricFamily(name, text, labels=list(self._labels))
        metric.add_metric(list(self._labels.values()), list(zip(bounds, counts, strict=True)), buckets.total)
        return metric
