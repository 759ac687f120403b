"""What an unfinished schedule step has reached: its finished blocks, and a point inside of a phase.

`<folder>/partial` is replaced piece by piece, each in one move and with a hash, so that a run that was
killed goes on at the last piece that was written whole.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from losa_deploy.manifest import sha256_file

FOLDER = "partial"
SAVE_SECONDS = 120.0
"""How much training a killed run loses at most."""


@dataclass(frozen=True)
class Point:
    """A place inside of a phase: losses so far, and the tensors that training goes on from."""

    labels: tuple[str | int, ...]
    factor: float
    """Of the learning rate."""
    losses: tuple[float, ...]
    tensors: Mapping[str, Tensor]


@dataclass
class Partial:
    """The partial folder of one schedule step."""

    folder: Path
    step: int
    saved: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        return self.folder / FOLDER

    def blocks(self) -> list[Mapping[str, object]]:
        """Records of the blocks finished in this step, as given to `save_block`; a damaged one ends them."""
        found: list[Mapping[str, object]] = []
        while (record := self._read(f"block-{len(found):05d}")) is not None:
            found.append(record)
        return found

    def block(self, block: int) -> Mapping[str, object] | None:
        """The record of a block finished in this step, None if there is none; its tensors are not checked."""
        return self._read(f"block-{block:05d}", check=False)

    def forget_blocks(self, first: int) -> None:
        """Let `first` and the blocks after it count as not finished."""
        for path in self.path.glob("block-*.json"):
            if int(path.stem.removeprefix("block-")) >= first:
                path.unlink()

    def block_file(self, block: int) -> Path:
        """The tensors of a finished block."""
        return self.path / f"block-{block:05d}.safetensors"

    def save_block(self, block: int, tensors: Mapping[str, Tensor], record: Mapping[str, object]) -> None:
        """A block is finished."""
        self._write(f"block-{block:05d}", tensors, record)

    def due(self) -> bool:
        """Whether it is time to save a point."""
        return time.monotonic() - self.saved > SAVE_SECONDS

    def save_point(self, point: Point, name: str = "point") -> None:
        """Replace the point that was saved before under this name; a kill leaves the old one or the new one.

        Its tensors therefore lie in one of two files, which the record names.
        """
        labels, losses = list(point.labels), list(point.losses)
        before = self._file(name)
        file = f"{name}.b.safetensors" if before == f"{name}.a.safetensors" else f"{name}.a.safetensors"
        record = {"labels": labels, "factor": point.factor, "losses": losses, "file": file}
        self._write(name, point.tensors, record, file)
        if before is not None:
            (self.path / before).unlink(missing_ok=True)
        self.saved = time.monotonic()

    def _file(self, name: str) -> str | None:
        """The file of the tensors that a record names."""
        record = self._read(name, check=False)
        return None if record is None else self._tensors(name, record)

    @staticmethod
    def _tensors(name: str, record: Mapping[str, object]) -> str:
        return str(record.get("file", f"{name}.safetensors"))

    def point(self, labels: tuple[str | int, ...], name: str = "point") -> Point | None:
        """The point saved in the phase with these labels, None if there is none."""
        from safetensors.torch import load_file

        record = self._read(name)
        if record is None or record["labels"] != list(labels):
            return None
        losses, factor = record["losses"], record["factor"]
        assert isinstance(losses, list) and isinstance(factor, float)
        return Point(labels, factor, tuple(losses), load_file(self.path / self._tensors(name, record)))

    def choice(self, name: str) -> str | None:
        """What `save_choice` was told under this name."""
        record = self._read(f"choice-{name}")
        return None if record is None else str(record["choice"])

    def save_choice(self, name: str, choice: str) -> None:
        """Note what was decided by circumstances, so that a resumed run decides alike."""
        self._write(f"choice-{name}", {}, {"choice": choice})

    def phase(self, number: int) -> Mapping[str, object] | None:
        """The record of a phase whose blocks were all saved by `save_phase`."""
        return self._read(f"phase-{number}")

    def phase_block(self, number: int, block: int) -> Mapping[str, object]:
        """The record that `save_phase` has left of a block; its tensors are not checked."""
        return self._read(self.phase_file(number, block).stem, check=False) or {}

    def phase_file(self, number: int, block: int | None) -> Path:
        """What a phase made of a block, or (None) of what is behind the last one."""
        return self.path / f"phase-{number}{'' if block is None else f'-block-{block:05d}'}.safetensors"

    def save_phase(
        self, number: int, block: int | None, tensors: Mapping[str, Tensor], record: Mapping[str, object]
    ) -> None:
        """What a phase made of a block; None, saved last, says that all are there."""
        self._write(self.phase_file(number, block).stem, tensors, record)

    def remove(self) -> None:
        """The step is finished."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(
        self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, object], other: str | None = None
    ) -> None:
        """Write tensors and their record; to an `other` file than that of the record that is there now."""
        from safetensors.torch import save_file

        self.path.mkdir(parents=True, exist_ok=True)
        # The record is written last and names the hash: without it the tensors do not count.
        if other is None:
            (self.path / f"{name}.json").unlink(missing_ok=True)
        file, partial = self.path / (other or f"{name}.safetensors"), self.path / f"{name}.partial"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        os.replace(partial, file)
        text = json.dumps({"step": self.step, "sha256": sha256_file(file), **record})
        partial.write_text(text, "utf-8")
        os.replace(partial, self.path / f"{name}.json")

    def _read(self, name: str, *, check: bool = True) -> Mapping[str, object] | None:
        try:
            record = json.loads((self.path / f"{name}.json").read_text("utf-8"))
            file = self.path / self._tensors(name, record)
            whole = not check or record["sha256"] == sha256_file(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if whole and record.get("step") == self.step else None
