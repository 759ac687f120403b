"""The `losa.bench/1` document: one machine, and one record per model or kernel measured on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from .environment import collect

SCHEMA = "losa.bench/1"


def machine_record() -> dict[str, object]:
    """This machine and its software, with the kernels that run on it."""
    from losa_deploy import _native

    record: dict[str, object] = collect().model_dump(mode="json")
    return record | {"kernels": _native.target_name()}


def bench_document(
    results: Sequence[Mapping[str, object]], workload: Mapping[str, object]
) -> dict[str, object]:
    """Records of models side by side, and the workload that all of them had."""
    return {
        "schema": SCHEMA,
        "machine": machine_record(),
        "workload": dict(workload),
        "results": [dict(result) for result in results],
    }


def result_record(
    name: str,
    decode_rates: Sequence[float],
    prefill_rates: Sequence[float],
    size_bytes: int,
    peak_rss_bytes: int | None,
) -> dict[str, object]:
    """Medians beside all samples; rates in tokens per second."""
    samples = [
        {"decode_tokens_per_second": decode, "prefill_tokens_per_second": prefill}
        for decode, prefill in zip(decode_rates, prefill_rates, strict=True)
    ]
    return {
        "name": name,
        "decode_tokens_per_second": median(decode_rates),
        "prefill_tokens_per_second": median(prefill_rates),
        "bytes": size_bytes,
        "peak_rss_bytes": peak_rss_bytes,
        "samples": samples,
    }
