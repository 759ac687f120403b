"""What exporters and runtimes are to the core: three narrow, typed interfaces.

Exporters and runtimes are found through entry points (`losa_deploy.plugins`), so that the core
never imports one and a third party can add one by shipping a class with these methods. What is about
a format or a runtime is asked here; nothing else tests their names. A class that inherits from
`Exporter` or `Runtime` gets the methods that have a usual answer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from losa_deploy.card import FormatNotes
from losa_deploy.layouts.base import PackOptions
from losa_deploy.layouts.dense import dense_size
from losa_deploy.manifest import TensorRecord
from losa_deploy.model import SparseModel
from losa_deploy.progress import Progress
from losa_deploy.recipe import ExportRecipe, ValueType
from losa_deploy.sources.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, int]]
"""Module → shape (out, in) of its weight."""
MaskOf = Callable[[tuple[int, int]], NDArray[np.bool_]]
"""Shape (out, in) → a mask [out, in] like those to come, True = kept."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: how it will be stored, what it costs, and why that layout."""

    name: str
    shape: tuple[int, int]
    layout: str
    value_type: ValueType
    nnz: int
    bytes: int
    reason: str
    pattern: tuple[int, int] | None = None
    """(N, M) of a layout that stores N of every M positions: with it a tensor is packed as planned."""
    rows_per_mask: int = 1
    """Of a bitmask: as in `PackOptions`."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per dense position, e.g. 4.14 for int4 with 128-position groups."""
        return 8.0 * self.bytes / max(1, self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write: `--dry-run` prints it, and `Exporter.export` stores each tensor by it."""

    format: str
    recipe: ExportRecipe
    """What the plan was made by."""
    files: Mapping[str, int]
    """File name → bytes, of what is not packed weights roughly."""
    tensors: tuple[PlannedTensor, ...]
    """Linears in block order, then embedding and head; of two forms in one folder those of the first."""
    peak_ram_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def by_name(self) -> Mapping[str, PlannedTensor]:
        """Module → its planned tensor."""
        return {tensor.name: tensor for tensor in self.tensors}


@dataclass(frozen=True)
class ExportedModel:
    """A finished artifact: its folder, its files (name → bytes) and what happened to each tensor."""

    folder: Path
    format: str
    files: Mapping[str, int]
    tensors: tuple[TensorRecord, ...]
    """The entries of `losa.json`: linears first, then embedding and head."""
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class SecondForm:
    """A second form of the model in an artifact's folder: what its bytes mean, and how they mean it."""

    linears: tuple[TensorRecord, ...]
    """As this form has to store each linear; that they were rounded so is what `verify` checks."""
    weights: Mapping[str, NDArray[np.float32]]
    """Linear, embedding, head → weight [out, in] as `Exporter.decode` returns it."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file stores it."""

    name: str
    shape: tuple[int, ...]
    layout: str
    value_type: str
    """In small letters; of a foreign file also a type that we do not write."""
    bytes: int
    kept: int | None = None
    """Stored values; None if the file does not say how many there are."""

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.bytes / max(1, int(np.prod(self.shape)))

    @property
    def sparsity(self) -> float | None:
        """Share of positions without a stored value."""
        return None if self.kept is None else 1.0 - self.kept / max(1, int(np.prod(self.shape)))


@dataclass(frozen=True)
class StoredFile:
    """What a single model file says of itself, without the folder that it was written into."""

    format: str
    architecture: str
    packed: bool
    """It holds weights without their zeros."""
    tensors: tuple[StoredTensor, ...]
    blocks: tuple[StoredTensor, ...]
    """Those of `tensors` that are block linears."""
    source: str = ""
    revision: str = ""
    sparsity: float | None = None
    value_type: str = ""
    tool_version: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Over the block linears."""
        positions = sum(int(np.prod(tensor.shape)) for tensor in self.blocks)
        return 8.0 * sum(tensor.bytes for tensor in self.blocks) / max(1, positions)


class Exporter(Protocol):
    """Writes one artifact format from a merged sparse model."""

    name: str
    runtime: str
    """The runtime that its artifacts are made for, by its name."""
    suffixes: tuple[str, ...] = ()
    """How the names of its weight files end: a folder may hold none that `losa.json` does not list."""

    @abstractmethod
    def estimate(
        self, linears: Shapes, others: Shapes, recipe: ExportRecipe, mask: MaskOf
    ) -> Mapping[str, tuple[PlannedTensor, ...]]:
        """The large files that `export` would write, by the rules of `plan`, before there are masks.

        `linears` get masks from `mask`, `others` (embedding, head) are dense. Small tensors are left out.
        """
        ...

    @abstractmethod
    def check_source(self, source: Checkpoint, recipe: ExportRecipe) -> None:
        """Raise what `plan` would raise about every model made from `source`, before it is compressed."""
        ...

    @abstractmethod
    def plan(self, model: SparseModel, recipe: ExportRecipe) -> ExportPlan:
        """What `export` will write, from headers and masks only; here each layout is chosen.

        Raises `InputError`/`MissingError` if this model cannot be written, `UsageError` for what the recipe
        asks for and the format or a mask does not allow.
        """
        ...

    @abstractmethod
    def export(self, model: SparseModel, plan: ExportPlan, folder: Path, progress: Progress) -> ExportedModel:
        """Write what `plan` says into `folder`, which exists and is empty; the caller renames it after that.

        Called through `losa_deploy.planned.export_planned`, which compares what was written with the plan.
        """
        ...

    @abstractmethod
    def export_dense(
        self, source: Checkpoint, exported: Path, folder: Path, progress: Progress
    ) -> ExportedModel:
        """Write the dense baseline of the artifact `exported`: the model `source` that it was pruned from.

        In the same format and, where the format has graphs, with the same graph; f32 (or what comes
        nearest in the format). `folder` exists and is empty.
        """
        ...

    @abstractmethod
    def decode(self, folder: Path) -> Mapping[str, NDArray[np.float32]]:
        """Linear name → weight [out, in] as the artifact's bytes define it (bit-exact unpack).

        Best a mapping that unpacks a weight when it is asked for, see `losa_deploy.lazy`.
        """
        ...

    def decode_beside(self, folder: Path) -> SecondForm | None:
        """The second form of the model that the folder holds, e.g. for other programs; None if it has one."""
        del folder
        return None

    def files_beside(self, folder: Path) -> tuple[str, ...]:
        """Names of the files of that second form: they are not part of the model that is opened."""
        del folder
        return ()

    def dense_bytes(self, shape: tuple[int, int], value_type: ValueType, group_size: int) -> int:
        """Bytes of a weight (out, in) that is stored dense in this value type."""
        return dense_size(shape, PackOptions(value_type=value_type, group_size=group_size))

    def describe(self, file: Path) -> StoredFile | None:
        """What a single file says of itself; None if it is not of this format, `InputError` if damaged."""
        del file
        return None

    def card(self, recipe: ExportRecipe) -> FormatNotes:
        """What the model card says about an artifact of this format."""
        del recipe
        return FormatNotes(library=self.name, needs=f"A runtime for {self.name} files.")


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


@runtime_checkable
class RewindableSession(Session, Protocol):
    """A session that can take tokens back; only such ones are asked to check drafts."""

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens in one pass; logits [len(tokens), vocab] after each. Needs a `prefill` before."""
        ...

    def rewind(self, length: int) -> bool:
        """Forget what comes after the first `length` tokens; False, and nothing happens, if it cannot."""
        ...


class Runtime(Protocol):
    """Opens artifacts of the formats it knows."""

    name: str
    opens: str
    """What it opens, for messages, e.g. "a folder with model.safetensors"."""
    preference: int = 0
    """Of several runtimes that can open a folder the highest does; below 0 only one that is named."""
    loading_bytes: float = 5.0
    """Per parameter, what it has in memory at once while it loads a model."""
    packs_at_load: bool = False
    """It leaves the zeros of dense weights out when it loads them."""
    fallback: str = ""
    """Why kernels of ours could not be used for the model opened last; empty if they were, or it has none."""

    @abstractmethod
    def supports(self, folder: Path) -> bool:
        """True if `folder` holds something this runtime can open (looks at file names only)."""
        ...

    @abstractmethod
    def open(self, folder: Path, *, threads: int) -> Session:
        """Load the model with `threads` threads (0: the runtime's own choice)."""
        ...

    def require(self, *, packed: bool) -> None:
        """Raise `MissingError` if this machine cannot open what it is for; called before any work.

        `packed`: the recipe asks for files without zeros.
        """
        del packed

    def exact(self) -> Runtime:
        """The runtime without kernels of ours, which may round activations; itself if it uses none."""
        return self

    def baseline(self) -> Runtime:
        """The runtime that dense models are measured in: as people have it without us; or itself."""
        return self

    def facts(self) -> Mapping[str, str]:
        """What `losa-deploy doctor` says about it on this machine."""
        return {}
