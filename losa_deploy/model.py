"""`SparseModel`: the one artifact of the core, an ordinary Hugging Face folder plus explicit masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.checkpoint import Checkpoint
from losa_deploy.families import Family
from losa_deploy.manifest import MANIFEST_FILE, Manifest

MASK_FILE = "masks.safetensors"


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

    def weight(self, linear: str) -> NDArray[np.float32]:
        """Weight [out, in] of a linear (or of embedding/head by module name), as f32."""
        return self.checkpoint.array(f"{linear}.weight")

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
