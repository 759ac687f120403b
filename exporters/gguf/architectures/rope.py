"""Rotary embedding as config.json describes it and llama.cpp computes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError

from .config import number, whole
from .refusals import ONNX_HINT

YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}
"""What llama.cpp computes YaRN with, whatever the file says."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency and scaling."""

    base: float
    kind: str
    """default, or the scaling: linear, yarn, llama3, or one that is refused."""
    values: Mapping[str, object]

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Rope:
        """From a `config.json` of transformers 4 or 5."""
        values: dict[str, object] = {}
        for key in ("rope_scaling", "rope_parameters"):
            found = config.get(key)
            values |= found if isinstance(found, Mapping) else {}
        kind = str(values.get("rope_type") or values.get("type") or "default")
        base = values.get("rope_theta") or config.get("rope_theta") or 10000.0
        return cls(float(str(base)), kind, values)

    def check(self, kinds: Sequence[str]) -> None:
        """Raise `InputError` for scaling that is not one of `kinds`, or that llama.cpp computes otherwise."""
        if self.kind not in ("default", *kinds):
            *most, last = kinds or ("none",)
            known = f"{', '.join(most)} and {last}" if most else last
            raise InputError(
                f"config.json scales the rotary embedding by {self.kind!r}; this exporter writes {known}.",
                hint=ONNX_HINT,
            )
        own = [key for key, usual in YARN.items() if self.values.get(key) not in (None, usual)]
        if self.kind == "yarn" and own:
            raise InputError(
                f"config.json sets {own[0]} of YaRN to {self.values[own[0]]}; llama.cpp takes no value from "
                "the file.",
                hint=ONNX_HINT,
            )

    def scaling_keys(self) -> dict[str, str | int | float]:
        """Keys of the scaling; llama3 has none, its factors are the tensor `rope_freqs.weight`."""
        if self.kind not in ("linear", "yarn"):
            return {}
        keys: dict[str, str | int | float] = {
            "rope.scaling.type": self.kind,
            "rope.scaling.factor": number(self.values, "factor", 1.0),
        }
        if self.kind == "yarn" and self.values.get("original_max_position_embeddings"):
            original = whole(self.values, "original_max_position_embeddings")
            keys["rope.scaling.original_context_length"] = original
        return keys

    def factors(self, width: int) -> NDArray[np.float32] | None:
        """llama3: by what each of the `width` / 2 frequencies is divided; None for other kinds.

        Frequencies whose wavelength is short against the original context stay, long ones are divided
        by `factor`, and those between change gradually.
        """
        if self.kind != "llama3":
            return None
        factor = number(self.values, "factor", 8.0)
        low, high = number(self.values, "low_freq_factor", 1.0), number(self.values, "high_freq_factor", 4.0)
        context = number(self.values, "original_max_position_embeddings", 8192)
        frequency = self.base ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        turns = context * frequency / (2 * pi)
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        divisors: NDArray[np.float32] = (1.0 / ((1 - smooth) / factor + smooth)).astype(np.float32)
        return divisors
