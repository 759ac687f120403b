"""What exporters and runtimes are to the core: three narrow, typed interfaces.

Exporters and runtimes are found through entry points (`losa_deploy.plugins`), so that the core
never imports one and a third party can add one by shipping a class with these methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from losa_deploy.manifest import TensorRecord
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.checkpoint import Checkpoint


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: how it will be stored, what it costs, and why that layout."""

    name: str
    shape: tuple[int, ...]
    layout: str
    value_type: str
    nnz: int
    bytes: int
    reason: str

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per dense position, e.g. 4.14 for int4 with 128-position groups."""
        return 8.0 * self.bytes / max(1, int(np.prod(self.shape)))


@dataclass(frozen=True)
class ExportPlan:
    """What an export would write; `--dry-run` prints exactly this."""

    format: str
    files: Mapping[str, int]
    tensors: tuple[PlannedTensor, ...]
    peak_ram_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class ExportedModel:
    """A finished artifact: its folder, its files (name → bytes) and what happened to each tensor."""

    folder: Path
    format: str
    files: Mapping[str, int]
    tensors: tuple[Mapping[str, object], ...]
    """Entries of `losa.json` (`name`, `shape`, `layout`, `value_type`, `nnz`, `bytes`,
    `bits_per_weight`, `sha256`), linears first, then embedding and head."""
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class SecondForm:
    """A second form of the model in an artifact's folder: what its bytes mean, and how they mean it."""

    linears: tuple[TensorRecord, ...]
    """As this form has to store each linear; that they were rounded so is what `verify` checks."""
    weights: Mapping[str, NDArray[np.float32]]
    """Linear, embedding, head → weight [out, in] as `Exporter.decode` returns it."""


class Exporter(Protocol):
    """Writes one artifact format from a merged sparse model."""

    name: str
    building_bytes: float
    """Per parameter, what `export` has in memory at once; 0 if one tensor at a time."""
    judge: str
    """The runtime that judges an artifact without kernels of ours (see `Runtime.exact`)."""

    def parts(self, recipe: ExportRecipe) -> Mapping[str, bool]:
        """The large files that `export` would write, and whether their weights are all dense."""
        ...

    def check_source(self, source: Checkpoint, recipe: ExportRecipe) -> None:
        """Raise what `check` would raise about every model made from `source`, before it is compressed."""
        ...

    def check(self, model: SparseModel, recipe: ExportRecipe) -> None:
        """Raise `InputError`/`MissingError` if this model cannot be written; called before any work."""
        ...

    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        """What `export` would write, from headers and masks only."""
        ...

    def export(
        self, model: SparseModel, recipe: ExportRecipe, folder: Path, progress: Progress
    ) -> ExportedModel:
        """Write into `folder`, which exists and is empty; the caller renames it when all is done."""
        ...

    def export_dense(
        self, source: Checkpoint, exported: Path, folder: Path, progress: Progress
    ) -> ExportedModel:
        """Write the dense baseline of the artifact `exported`: the model `source` that it was pruned from.

        In the same format and, where the format has graphs, with the same graph; f32 (or what comes
        nearest in the format). `folder` exists and is empty.
        """
        ...

    def decode(self, folder: Path) -> Mapping[str, NDArray[np.float32]]:
        """Linear name → weight [out, in] as the artifact's bytes define it (bit-exact unpack).

        Best a mapping that unpacks a weight when it is asked for, see `losa_deploy.lazy`.
        """
        ...

    def decode_beside(self, folder: Path) -> SecondForm | None:
        """The second form of the model that the folder holds, e.g. for other programs; None if it has one."""
        ...


class Session(Protocol):
    """An open model in one runtime. One sequence at a time, with a key/value cache."""

    vocab_size: int
    context_length: int
    """The most tokens a sequence may have; 0 if the model does not say."""

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache; the cache is left empty."""
        ...

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence with `tokens`; returns the logits [vocab] after the last one."""
        ...

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; returns the logits [vocab] after it. Needs a `prefill` before."""
        ...

    def close(self) -> None:
        """Free the model; the session cannot be used afterwards."""
        ...


class Runtime(Protocol):
    """Opens artifacts of the formats it knows."""

    name: str

    def supports(self, folder: Path) -> bool:
        """True if `folder` holds something this runtime can open (looks at file names only)."""
        ...

    def open(self, folder: Path, *, threads: int) -> Session:
        """Load the model with `threads` threads (0: the runtime's own choice)."""
        ...

    def exact(self) -> Runtime:
        """The runtime without kernels of ours, which may round activations; itself if it uses none."""
        ...

    def baseline(self) -> Runtime:
        """The runtime that dense models are measured in: as people have it without us; or itself."""
        ...
