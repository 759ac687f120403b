"""From measurements to the report document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from losa_deploy.card import mean_bits
from losa_deploy.interfaces import Exporter, Runtime
from losa_deploy.manifest import Manifest
from losa_deploy.model import SparseModel
from losa_deploy.recipe import Recipe
from losa_deploy.sources.checkpoint import Checkpoint
from losa_deploy.verify.distance import Floats
from losa_deploy.verify.judge import Parity

from ..accuracy import Perplexity, loss_difference
from ..environment import collect
from ..latency import Latency
from ..memory import Footprint
from ..rival import RivalFile
from ..rival_verdict import Match, Side
from ..workloads import QUICK, Workload
from .baseline import DenseBaseline, folder_bytes
from .document import (
    BlocksPart,
    EvaluationPart,
    MergeProofPart,
    ModelNumbers,
    ParityPart,
    Report,
    RivalPart,
    SamplesPart,
    SparsityPart,
    WorkloadPart,
)
from .verdict import Evidence, decide

TORCH = "torch"
"""Where the merged model is measured, and the dense one if it is too large to be run otherwise."""


@dataclass(frozen=True)
class Job:
    """What is measured, and with what."""

    source: Checkpoint | None
    """The dense model; None if it is not at hand, then only its perplexity is left out: the merged
    model exported dense has its size and speed."""
    model: SparseModel
    exported: Path
    exporter: Exporter
    runtime: Runtime
    work: Path
    """Where the dense baseline is kept."""
    recipe: Recipe
    threads: int
    workload: Workload = QUICK
    memory: int | None = None
    """Bytes that the dense model may take; None: what is free."""
    warn: Callable[[str], None] = lambda line: None
    """Hears what the user should know of the run."""


@dataclass
class Found:
    """Numbers by model name, filled in step by step."""

    dense: DenseBaseline
    rival: RivalFile
    losses: dict[str, list[Floats]] = field(default_factory=dict)
    """Of every window, in nats per token."""
    quality: dict[str, Perplexity] = field(default_factory=dict)
    speed: dict[str, Latency] = field(default_factory=dict)
    footprint: dict[str, Footprint] = field(default_factory=dict)
    windows_asked: int = 0
    """Windows of the text, of which `verify.minutes` may leave some out."""
    timings: dict[str, float] = field(default_factory=dict)


def assemble(job: Job, found: Found, parity: Parity | None) -> Report:
    exported, merged = Manifest.read(job.exported), job.model.manifest
    exported_bytes = folder_bytes(job.exported, exported)
    dense, dense_runtime = found.dense, job.runtime.baseline().name if found.dense.folder else TORCH
    dense_numbers = _measured("dense", dense_runtime, dense.bytes, dense.bits_per_weight, found)
    merged_bytes = folder_bytes(job.model.folder, merged)
    merged_numbers = _measured("merged", TORCH, merged_bytes, mean_bits(merged), found)
    exported_numbers = _measured("exported", job.runtime.name, exported_bytes, mean_bits(exported), found)
    rival = rival_part(found)
    quality = found.quality["exported"]
    same_type = dense_same_type_bytes(exported_bytes, exported, job.exporter)
    return Report(
        model=merged.source.id,
        revision=merged.source.revision,
        format=exported.format,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        recipe=job.recipe.model_dump(mode="json"),
        sparsity=SparsityPart(
            target=job.recipe.sparsity.target,
            achieved=merged.sparsity_achieved,
            pattern=job.recipe.sparsity.pattern,
        ),
        merge_proof=_proof_part(merged),
        parity=_parity_part(parity),
        dense=dense_numbers,
        merged=merged_numbers,
        exported=exported_numbers,
        rival=rival,
        dense_same_type_bytes=same_type,
        evaluation=EvaluationPart(
            text=job.recipe.verify.text,
            window=quality.window,
            windows=quality.windows,
            windows_asked=found.windows_asked,
            tokens=quality.tokens,
        ),
        workload=_workload_part(found.speed["exported"].workload, job.threads),
        samples={name: _samples_part(speed) for name, speed in found.speed.items()},
        blocks=BlocksPart(sparsity=merged.block_sparsity, rank=merged.block_rank, error=merged.block_error),
        training=merged.training,
        environment=collect(),
        timings=found.timings,
        verdict=decide(_evidence(job, found, exported, exported_numbers, same_type)),
    )


def rival_part(found: Found) -> RivalPart:
    """What was measured on the rival, or why nothing was."""
    rival = found.rival
    if rival.path is None:
        return RivalPart(kind=rival.kind, reason=rival.reason)
    difference = loss_difference(found.losses["exported"], found.losses["rival"])
    return RivalPart(
        kind=rival.kind,
        numbers=_measured("rival", rival.runtime, rival.path.stat().st_size, rival.bits_per_weight, found),
        loss_difference=difference.value,
        loss_difference_stderr=difference.stderr,
    )


def dense_same_type_bytes(exported_bytes: int, manifest: Manifest, exporter: Exporter) -> int:
    """The exported folder if each linear were dense in its own value type, from shapes."""
    group_size = manifest.recipe.export.group_size
    total = exported_bytes
    for record in manifest.linears:
        shape = (record.shape[0], record.shape[1])
        total += exporter.dense_bytes(shape, record.value_type, group_size) - record.bytes
    return total


def _measured(name: str, runtime: str, size_bytes: int, bits: float, found: Found) -> ModelNumbers:
    """What was measured under this name; the rest stays None."""
    quality, speed = found.quality.get(name), found.speed.get(name)
    footprint = found.footprint.get(name)
    return ModelNumbers(
        runtime=runtime,
        size_bytes=size_bytes,
        bits_per_weight=bits,
        perplexity=quality.perplexity if quality else None,
        perplexity_stderr=quality.stderr if quality else None,
        perplexity_stderr_windows=quality.stderr_windows if quality else None,
        decode_tokens_per_second=speed.decode_tokens_per_second if speed else None,
        prefill_tokens_per_second=speed.prefill_tokens_per_second if speed else None,
        peak_rss_bytes=footprint.peak_rss_bytes if footprint else None,
        load_seconds=footprint.load_seconds if footprint else None,
    )


def _proof_part(manifest: Manifest) -> MergeProofPart | None:
    proof = manifest.merge_proof
    if proof is None:
        return None
    return MergeProofPart(
        ok=proof.ok,
        support_equal=proof.support_equal,
        max_abs_logit_difference=proof.max_abs_logit_difference,
        cast_error=proof.cast_error,
    )


def _parity_part(parity: Parity | None) -> ParityPart | None:
    """None if parity was not checked."""
    if parity is None:
        return None
    return ParityPart.model_validate({key: getattr(parity, key) for key in ParityPart.model_fields})


def _workload_part(workload: Workload, threads: int) -> WorkloadPart:
    return WorkloadPart(
        prompt_tokens=workload.prompt_tokens,
        decode_tokens=workload.decode_tokens,
        warmup=workload.warmup,
        threads=threads,
    )


def _samples_part(speed: Latency) -> SamplesPart:
    return SamplesPart(
        prefill_tokens_per_second=speed.prefill_rates, decode_tokens_per_second=speed.decode_rates
    )


def _kernels(job: Job) -> str:
    """Native kernels that the runtime uses; a runtime that is its own exact form uses none."""
    from losa_deploy import _native

    unused = job.runtime.exact() is job.runtime or bool(job.runtime.fallback)
    return "" if unused else _native.target_name()


def _evidence(
    job: Job, found: Found, exported: Manifest, exported_numbers: ModelNumbers, same_type_bytes: int
) -> Evidence:
    dense, speed = found.speed.get("dense"), found.speed["exported"]
    return Evidence(
        value_type=job.recipe.export.value_type,
        dense_type=found.dense.value_type,
        exported_bytes=exported_numbers.size_bytes,
        dense_same_type_bytes=same_type_bytes,
        dense_bytes=found.dense.bytes,
        block_bits_per_weight=exported_numbers.bits_per_weight,
        packed=any(record.layout != "dense" for record in exported.linears),
        packed_at_load=job.runtime.packs_at_load and bool(_kernels(job)),
        runtime=job.runtime.name,
        dense_runtime=job.runtime.baseline().name,
        kernels=_kernels(job),
        exported_decode=speed.decode_tokens_per_second,
        dense_decode=dense.decode_tokens_per_second if dense else None,
        dense_missing=found.dense.reason,
        decode_noise=max(speed.decode_spread, dense.decode_spread if dense else 0.0),
        exported_rss=found.footprint["exported"].peak_rss_bytes,
        dense_rss=found.footprint["dense"].peak_rss_bytes if dense else None,
        dense_perplexity=found.quality["dense"].perplexity if "dense" in found.quality else None,
        merged_perplexity=found.quality["merged"].perplexity,
        exported_perplexity=found.quality["exported"].perplexity,
        merged_perplexity_stderr=found.quality["merged"].stderr,
        rival=_match(found, exported_numbers.size_bytes),
        rival_missing=found.rival.reason,
    )


def _match(found: Found, exported_bytes: int) -> Match | None:
    """The artifact beside the rival; None if that was not measured."""
    path = found.rival.path
    if path is None:
        return None
    difference = loss_difference(found.losses["exported"], found.losses["rival"])

    def side(name: str, label: str, size: int) -> Side:
        speed = found.speed[name]
        return Side(
            label,
            size,
            found.quality[name].perplexity,
            speed.decode_tokens_per_second,
            speed.prefill_tokens_per_second,
            found.footprint[name].peak_rss_bytes,
        )

    return Match(
        side("exported", "this file", exported_bytes),
        side("rival", found.rival.label, path.stat().st_size),
        difference.value,
        difference.stderr,
        max(found.speed[name].decode_spread for name in ("exported", "rival")),
    )
