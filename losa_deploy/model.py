"""`SparseModel`: the one artifact of the core, an ordinary Hugging Face folder plus explicit masks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.families import Family
from losa_deploy.layouts import VALUE_TYPES
from losa_deploy.layouts.base import PackOptions
from losa_deploy.manifest import MANIFEST_FILE, Manifest
from losa_deploy.phases import LEVELS
from losa_deploy.sources.checkpoint import Checkpoint

MASK_FILE = "masks.safetensors"
GRID_FILE = "grid.safetensors"
GRID_KEY = "losa.grid"
"""Key of the header of `grid.safetensors`: a JSON object, linear → [value type, group size]."""


@dataclass(frozen=True)
class WeightGrid:
    """The grid that a linear was trained on: every weight is a whole level times the scale of its group."""

    value_type: str
    group_size: int
    """Positions per scale; 0: one scale per row."""
    scales: NDArray[np.float16]
    """[out, groups]"""

    def values(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a weight [out, in], stored in whatever type, means on the grid."""
        columns = weight.shape[1]
        scale = self.scales.astype(np.float32).repeat(self.group_size or columns, axis=1)[:, :columns]
        level = np.divide(weight, scale, out=np.zeros_like(weight), where=scale != 0)
        level = np.clip(np.rint(level), *LEVELS[self.value_type])
        result: NDArray[np.float32] = level * scale + np.float32(0)
        return result

    def rows(self, order: NDArray[np.intp] | None) -> WeightGrid:
        """The grid of the weight with its rows reordered."""
        return self if order is None else replace(self, scales=self.scales[order])

    def fits(self, value_type: str, group_size: int) -> bool:
        """Whether values of this type, in groups of this size, can be exactly those of the grid."""
        kind, (lowest, highest) = VALUE_TYPES[value_type], LEVELS[self.value_type]
        if kind.levels is None or not (kind.levels[0] <= lowest and highest <= kind.levels[1]):
            return False
        if not self.group_size:
            return not kind.grouped
        return kind.grouped and self.group_size % group_size == 0

    def fitted(self, options: PackOptions, columns: int) -> PackOptions:
        """`options` with the grid's own scales if it fits them."""
        if not self.fits(options.value_type, options.group_size):
            return options
        if not self.group_size:
            return replace(options, scales=self.scales)
        scales = self.scales.repeat(self.group_size // options.group_size, axis=1)
        return replace(options, scales=scales[:, : -(-columns // options.group_size)])


def pack_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """[out, in] bool → [ceil(out·in/8)] uint8, row-major, lowest bit first (True = kept)."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack_mask(bits: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Inverse of `pack_mask` for a linear of `shape` [out, in]."""
    flat = np.unpackbits(bits, count=shape[0] * shape[1], bitorder="little")
    return flat.astype(np.bool_).reshape(shape)


@dataclass(frozen=True)
class SparseModel:
    """A merged model: weights with exact zeros, masks as data, provenance in `losa.json`.

    `folder` is what `losa-deploy merge` wrote; it opens in transformers like any other model.
    """

    checkpoint: Checkpoint

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def family(self) -> Family:
        return self.checkpoint.family

    @property
    def config(self) -> Mapping[str, object]:
        return self.checkpoint.config

    @cached_property
    def manifest(self) -> Manifest:
        """The parsed `losa.json`."""
        return Manifest.read(self.folder)

    @cached_property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Name (e.g. `model.layers.0.self_attn.q_proj`) → shape (out, in) of every block linear."""
        return self.checkpoint.linears

    @cached_property
    def masked(self) -> frozenset[str]:
        """Names of the linears that have a mask; the others are dense."""
        from safetensors import safe_open

        with safe_open(self.folder / MASK_FILE, framework="numpy") as handle:
            return frozenset(handle.keys())

    def check_masks(self) -> None:
        """Raise `InputError` naming a mask that is not one of a block linear."""
        from losa_deploy.errors import InputError

        unknown = sorted(self.masked - set(self.linears))
        if unknown:
            raise InputError(
                f"{MASK_FILE} has a mask for {unknown[0]}, which is no block linear of this model.",
                hint="Merge the model again.",
            )

    def weight(self, linear: str) -> NDArray[np.float32]:
        """Weight [out, in] of a linear (or of embedding/head by module name), as f32."""
        return self.checkpoint.array(f"{linear}.weight")

    def grid(self, linear: str) -> WeightGrid | None:
        """The grid that a linear was trained on, None if it may have any values."""
        kind = self._grids.get(linear)
        if kind is None:
            return None
        from safetensors import safe_open

        with safe_open(self.folder / GRID_FILE, framework="numpy") as handle:
            return WeightGrid(kind[0], kind[1], handle.get_tensor(linear))

    @cached_property
    def _grids(self) -> Mapping[str, tuple[str, int]]:
        """Value type and group size of the linears that have a grid."""
        from safetensors import SafetensorError, safe_open

        from losa_deploy.errors import InputError

        path = self.folder / GRID_FILE
        if not path.is_file():
            return {}
        try:
            with safe_open(path, framework="numpy") as handle:
                found = json.loads(handle.metadata()[GRID_KEY])
            return {name: (str(kind), int(size)) for name, (kind, size) in found.items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be read: {error}.", hint="Merge the model again.") from None

    def mask(self, linear: str) -> NDArray[np.bool_]:
        """Mask [out, in], True = kept. All True for a linear without a mask."""
        shape = self.linears[linear]
        if linear not in self.masked:
            return np.ones(shape, np.bool_)
        from safetensors import safe_open

        with safe_open(self.folder / MASK_FILE, framework="numpy") as handle:
            return unpack_mask(handle.get_tensor(linear), shape)

    @classmethod
    def open(cls, folder: Path) -> SparseModel:
        """Open a merged folder; raises `InputError` if it is not one of ours."""
        from losa_deploy.errors import InputError

        for name in (MASK_FILE, MANIFEST_FILE):
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder} has no {name}, so it is not a merged losa-deploy model.",
                    hint="Make one with `losa-deploy compress` and `losa-deploy merge`.",
                )
        return cls(Checkpoint.open(folder))
