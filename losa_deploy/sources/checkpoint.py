"""A checkpoint on disk: config, tokenizer files, lazily read tensors; and a sharded writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError
from losa_deploy.families import Family, find_family
from losa_deploy.pretrained import full_config
from losa_deploy.sources.weight_files import INDEX_FILE, weight_files

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What an output folder inherits from its source besides weights."""
GGUF_TOKENIZER_FILE = "gguf-tokenizer.json"
"""What a GGUF source says about its tokenizer beyond tokenizer.json; kept up to the merged folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face folder with safetensors weights (one file or shards), read tensor by tensor."""

    folder: Path
    config: Mapping[str, object]
    """`config.json` with what it leaves to the defaults of its architecture filled in."""
    family: Family

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read `config.json` and check the family and the weight files before touching weights."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text("utf-8"))
        except OSError:
            raise InputError(
                f"{folder} has no config.json, so it is not a Hugging Face model folder.",
                hint="Give --model a folder with config.json and *.safetensors, or a .gguf file.",
            ) from None
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON: {error}.", hint="Copy the file again.") from None
        if not isinstance(config, dict):
            raise InputError(f"{path} is not a JSON object.", hint="Copy the file again.")
        family = find_family(config)
        checkpoint = cls(folder, full_config(folder), family)
        checkpoint.files  # noqa: B018 - fails here if a weight file is missing
        return checkpoint

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Tensor name → the safetensors file holding it; see `weight_files`."""
        return weight_files(self.folder)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    @cached_property
    def tied(self) -> bool:
        """True if the head is the embedding.

        As in transformers, a head of its own that is stored beside the embedding stays one, whatever
        `tie_word_embeddings` says.
        """
        if not self.config.get("tie_word_embeddings", False):
            return False
        embedding, head = f"{self.family.embedding}.weight", f"{self.family.head}.weight"
        return head not in self or bool((self.tensor(head) == self.tensor(embedding)).all())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header only."""
        return self.header(name)[1]

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type as safetensors calls it (e.g. `BF16`) and shape of a tensor, from the header only."""
        from safetensors import safe_open

        with safe_open(self.file_of(name), framework="numpy") as handle:
            found = handle.get_slice(name)
            return str(found.get_dtype()), tuple(found.get_shape())

    def file_of(self, name: str) -> Path:
        """File of a tensor; raises `InputError` naming the tensor if there is none."""
        try:
            return self.files[name]
        except KeyError:
            raise InputError(
                f"{self.folder} has no tensor {name!r}, which a {self.family.name} model needs.",
                hint="Check that config.json belongs to these weights.",
            ) from None

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype."""
        from safetensors import safe_open

        with safe_open(self.file_of(name), framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
            return tensor

    def array(self, name: str) -> NDArray[np.float32]:
        """The tensor as f32 (exact for f16, bf16 and f32 sources)."""
        array: NDArray[np.float32] = self.tensor(name).float().numpy()
        return array

    @cached_property
    def block_count(self) -> int:
        """Number of decoder blocks, from the tensor names."""
        prefix = self.family.blocks + "."
        indices = {int(n[len(prefix) :].split(".")[0]) for n in self.files if n.startswith(prefix)}
        if indices != set(range(len(indices))) or not indices:
            raise InputError(
                f"{self.folder} has weights for blocks {sorted(indices)[:5]}…, "
                "expected 0, 1, 2, … without holes.",
                hint="Download the model again.",
            )
        return len(indices)

    @cached_property
    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Block linear → shape (out, in), in block order and then in family order."""
        result: dict[str, tuple[int, int]] = {}
        for block in range(self.block_count):
            for linear in self.family.block_linears():
                name = f"{self.family.blocks}.{block}.{linear}"
                out_features, in_features = self.shape(f"{name}.weight")
                result[name] = (out_features, in_features)
        return result


def copy_side_files(source: Path, target: Path, more: Iterable[str] = ()) -> None:
    """Copy config, tokenizer and template files that exist, and `more`; `config.json` stays as it is."""
    for name in (*SIDE_FILES, *more):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index when they exceed `shard_bytes`.

    Streams: at most one shard is in memory. File names follow the Hugging Face convention.
    """
    from safetensors.torch import save_file

    parts: list[tuple[Path, list[str]]] = []
    current: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal current, size
        path = folder / f"part-{len(parts)}.safetensors"
        save_file(current, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
        parts.append((path, list(current)))
        current, size = {}, 0

    for name, tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        if current and size + tensor_bytes > shard_bytes:
            flush()
        current[name] = tensor.contiguous()
        size += tensor_bytes
        total += tensor_bytes
    flush()
    if len(parts) == 1:
        parts[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(parts, start=1):
        final = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        path.rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
