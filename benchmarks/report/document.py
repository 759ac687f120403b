"""The report of a run: one document with every number, from which tables and the card are rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from losa_deploy import __version__
from losa_deploy.card import CardNumbers
from losa_deploy.manifest import TrainingRecord

from ..environment import Environment
from ..training import FILE as TRAINING_FILE
from ..training import training_plot
from .render import TableRow, card_rows, markdown, table_header, terminal_rows
from .verdict import Verdict


class Part(BaseModel):
    """Base of the report's parts: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class SparsityPart(Part):
    """Fraction of pruned weights over the masked linears."""

    target: float
    achieved: float
    pattern: str


class MergeProofPart(Part):
    """The merge lost nothing: see `losa.json` for the definitions."""

    ok: bool
    support_equal: bool
    max_abs_logit_difference: float
    cast_error: float


class ParityPart(Part):
    """Exported against merged in the real runtime."""

    ok: bool
    max_abs_logit_difference: float
    greedy_tokens_equal: bool
    ties: tuple[str, ...] = ()
    decoded_logit_difference: float | None = None
    decoded_logit_tolerance: float | None = None
    """None, both, if the model was not run without native kernels: it does not fit into memory in f32."""
    kernel_kl: float | None = None
    mean_kl: float
    same_top_rate: float
    positions: int


class ModelNumbers(Part):
    """What was measured on one of the three models; what does not apply is left out."""

    runtime: str
    size_bytes: int
    bits_per_weight: float
    """Of the block linears."""
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    perplexity_stderr_windows: float | None = None
    decode_tokens_per_second: float | None = None
    prefill_tokens_per_second: float | None = None
    peak_rss_bytes: int | None = None
    load_seconds: float | None = None


class RivalPart(Part):
    """llama.cpp's own quantization of the same dense model, measured in the same run; or why it was not."""

    kind: str
    """llama.cpp's name of the type, e.g. q4_0."""
    numbers: ModelNumbers | None = None
    """None if it was not measured."""
    reason: str = ""
    """Why it was not."""
    loss_difference: float | None = None
    """Exported minus rival over the same tokens, nats per token."""
    loss_difference_stderr: float | None = None


class EvaluationPart(Part):
    """What perplexity was measured on."""

    text: str
    window: int
    windows: int
    windows_asked: int | None = None
    """More than `windows` if `verify.minutes` did not allow for all; None in reports of earlier versions."""
    tokens: int


class WorkloadPart(Part):
    """What speed was measured with."""

    prompt_tokens: int
    decode_tokens: int
    warmup: int
    threads: int


class BlocksPart(Part):
    """One entry per block: sparsity, adapter rank (if any), relative output error."""

    sparsity: tuple[float, ...]
    rank: tuple[int, ...]
    error: tuple[float, ...]


class SamplesPart(Part):
    """Every kept sample, tokens per second."""

    prefill_tokens_per_second: tuple[float, ...]
    decode_tokens_per_second: tuple[float, ...]


class Report(Part):
    """`report.json`, schema losa.report/1."""

    schema_: Literal["losa.report/1"] = Field(default="losa.report/1", alias="schema")
    tool_version: str = __version__
    model: str
    revision: str = ""
    format: str
    created: str
    """UTC, ISO 8601; the only timestamp among the outputs."""
    recipe: Mapping[str, object]
    sparsity: SparsityPart
    merge_proof: MergeProofPart | None = None
    parity: ParityPart | None = None
    dense: ModelNumbers
    merged: ModelNumbers
    exported: ModelNumbers
    rival: RivalPart | None = None
    """None in reports of earlier versions."""
    dense_same_type_bytes: int
    """The exported folder if every linear were dense in its value type, computed from shapes."""
    evaluation: EvaluationPart
    workload: WorkloadPart
    samples: Mapping[str, SamplesPart]
    blocks: BlocksPart
    training: tuple[TrainingRecord, ...] = ()
    """One per phase and schedule step, as in `losa.json`."""
    environment: Environment
    timings: Mapping[str, float]
    """Stage → seconds."""
    verdict: Verdict

    def to_json(self) -> dict[str, object]:
        """The document; None fields are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def write(self, folder: Path) -> None:
        """Write `report.json`, `report.md` and, if something was trained, `training.svg`."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", "utf-8")
        (folder / "report.md").write_text(markdown(self), "utf-8")
        if plot := training_plot(self.training):
            (folder / TRAINING_FILE).write_text(plot, "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Report:
        """Parse `folder/report.json`; pydantic's `ValidationError` if it is of another schema."""
        return cls.model_validate_json((folder / "report.json").read_bytes())

    def table(self) -> list[TableRow]:
        """Rows for the terminal, at most 13; `header` names their columns."""
        return terminal_rows(self)

    def header(self) -> TableRow:
        """Names of the columns: a label, dense, merged, exported, and the rival if it was measured."""
        return table_header(self)

    def card(self) -> CardNumbers:
        """What the model card shows of this report."""
        return CardNumbers(
            rows=tuple(card_rows(self)),
            machine=self.environment.line(),
            conditions=(
                f"{self.workload.threads} threads, {self.exported.runtime} "
                f"{self.environment.versions.get('onnxruntime', '')}".rstrip()
                + f"; prefill {self.workload.prompt_tokens}, decode {self.workload.decode_tokens} tokens"
            ),
            evaluation=(
                f"text `{self.evaluation.text}`, {self.evaluation.tokens} tokens in windows of "
                f"{self.evaluation.window}"
            ),
            verdict=self.verdict.lines,
            perplexity=self.exported.perplexity,
        )
