"""`losa.json`: what a folder holds, where it came from, and the hash of everything in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from losa_deploy import __version__
from losa_deploy.errors import InputError
from losa_deploy.recipe import ExportRecipe, Recipe

if TYPE_CHECKING:
    from losa_deploy.layouts import PackedTensor

MANIFEST_FILE = "losa.json"
SCHEMA = "losa.manifest/1"


class Record(BaseModel):
    """Base of the manifest's parts: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class SourceRecord(Record):
    """The dense model a folder was made from."""

    id: str
    revision: str = ""
    files: dict[str, str] = Field(default_factory=dict)
    """Weight and config file name → sha256."""
    license: str = ""


class GridRecord(Record):
    """The grid that a linear's weights are on."""

    value_type: Literal["none", "export", "i8", "i4", "i3", "i2"]
    group_size: int
    """Positions per scale; 0: a scale per row."""


class TrainingRecord(Record):
    """What one phase did in one schedule step."""

    step: int
    phase: int
    """Its number in the recipe, from 0."""
    tokens: int
    """Trained on; of a block phase for each block."""
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    """Block phases: held-out error of each block, relative, mean over tokens."""
    losses: tuple[float, ...] = ()
    """Phases through the whole model: the loss over training, at most 200 means of equal stretches."""


class TensorRecord(Record):
    """How one linear (or the embedding, or the head) is stored."""

    name: str
    shape: tuple[int, ...]
    layout: str
    value_type: str
    nnz: int
    bytes: int
    bits_per_weight: float
    sha256: str
    """Over the stored bytes, components in layout order."""
    reason: str = ""
    group_size: int = 0
    """Grouped types only: positions per scale, where they are not those of the recipe."""

    @classmethod
    def of(cls, name: str, packed: PackedTensor, reason: str = "") -> TensorRecord:
        """How a packed tensor is stored; `reason` says why in its layout."""
        return cls(
            name=name,
            shape=packed.shape,
            layout=packed.layout,
            value_type=packed.value_type,
            nnz=packed.nnz,
            bytes=packed.nbytes,
            bits_per_weight=round(packed.bits_per_weight, 6),
            sha256=packed.sha256,
            reason=reason,
        )

    @classmethod
    def of_dense(
        cls,
        name: str,
        shape: tuple[int, ...],
        value_type: str,
        nnz: int,
        data: memoryview,
        reason: str = "",
        group_size: int = 0,
    ) -> TensorRecord:
        """How a dense tensor is stored whose bytes are `data`, in a container's own type."""
        return cls(
            name=name,
            shape=shape,
            layout="dense",
            value_type=value_type,
            nnz=nnz,
            bytes=data.nbytes,
            bits_per_weight=round(8.0 * data.nbytes / max(1, prod(shape)), 6),
            sha256=hashlib.sha256(data).hexdigest(),
            reason=reason,
            group_size=group_size,
        )


class MergeProof(Record):
    """The evidence that the merge lost nothing (law 2)."""

    ok: bool
    support_equal: bool
    """No position outside the mask is non-zero, bit for bit, in every linear."""
    grid_equal: bool | None = None
    """Every weight is exactly a level times its scale, before and after the cast; None without a grid."""
    max_abs_logit_difference: float
    """Merged weights before the cast against the adapted model (base plus adapter branch), f32."""
    logit_tolerance: float
    cast_logit_difference: float
    """The merged folder as loaded from disk against the adapted model; includes the cast."""
    cast_error: float
    """Largest relative Frobenius error of the one cast to the output dtype, over the linears."""
    kept_zeros: int
    """Kept weights whose value is exactly zero: legal, because masks are data."""


class Manifest(Record):
    """The parsed `losa.json` of an adapted, merged or exported folder, or of a dense baseline."""

    schema_: str = Field(default=SCHEMA, alias="schema")
    kind: Literal["adapted", "merged", "exported", "dense"]
    tool_version: str = __version__
    format: str = "safetensors"
    source: SourceRecord
    recipe: Recipe
    calibration_sha256: str = ""
    sparsity_achieved: float
    """Pruned positions over all positions of the masked linears."""
    block_sparsity: tuple[float, ...] = ()
    block_rank: tuple[int, ...] = ()
    block_error: tuple[float, ...] = ()
    """Relative error of each block's output against the dense block, after the last step."""
    linears: tuple[TensorRecord, ...]
    other_tensors: tuple[TensorRecord, ...] = ()
    """Embedding and head, where the format stores them apart."""
    training: tuple[TrainingRecord, ...] = ()
    merge_proof: MergeProof | None = None
    files: dict[str, str] = Field(default_factory=dict)
    """File name → sha256, for every file of the folder except this one and the reports."""

    def exported(
        self,
        format: str,
        recipe: ExportRecipe,
        linears: Iterable[TensorRecord],
        others: Iterable[TensorRecord],
        folder: Path,
    ) -> Manifest:
        """That of an artifact in `folder`, made from the merged model that this one is of."""
        changes = {
            "kind": "exported",
            "format": format,
            "recipe": self.recipe.model_copy(update={"export": recipe}),
            "linears": tuple(linears),
            "other_tensors": tuple(others),
            "files": hash_files(folder),
        }
        return self.model_copy(update=changes)

    def write(self, folder: Path) -> None:
        """Write `folder/losa.json` (no timestamps: equal runs give equal bytes)."""
        text = json.dumps(self.model_dump(mode="json", by_alias=True), indent=1)
        (folder / MANIFEST_FILE).write_text(text + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Parse `folder/losa.json`; raises `InputError` naming the file and the first wrong key."""
        path = folder / MANIFEST_FILE
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except OSError:
            raise InputError(
                f"{folder} has no {MANIFEST_FILE}.", hint="Is it a losa-deploy output?"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "(document)"
            raise InputError(
                f"{path} is damaged or of another version: {key}: {first['msg']}.",
                hint="Make the folder again with this version of losa-deploy.",
            ) from None
        if manifest.schema_ != SCHEMA:
            raise InputError(
                f"{path} has schema {manifest.schema_!r}, expected {SCHEMA!r}.",
                hint="Use the losa-deploy version that wrote it.",
            )
        return manifest


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in 1 MiB pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_files(folder: Path, skip: Iterable[str] = ()) -> dict[str, str]:
    """Hashes of all files below `folder`, by relative POSIX name, sorted; reports are left out."""
    reports = {"report.json", "report.md", "training.svg", "README.md", "export.log"}
    left_out = {MANIFEST_FILE, *reports, *skip}
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    names: Mapping[str, Path] = {p.relative_to(folder).as_posix(): p for p in paths}
    return {name: sha256_file(path) for name, path in names.items() if name not in left_out}
