"""A GGUF checkpoint as a Hugging Face folder in f32: the form every later stage reads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy import __version__
from losa_deploy.errors import InputError
from losa_deploy.families import find_family
from losa_deploy.gguf.file import open_header
from losa_deploy.gguf.names import ARCHITECTURE, BLOCKS, LICENSE
from losa_deploy.manifest import SourceRecord, sha256_file
from losa_deploy.output import remove, require_disk, sibling
from losa_deploy.progress import Progress
from losa_deploy.seal import damage, seal
from losa_deploy.sources.checkpoint import GGUF_TOKENIZER_FILE, Checkpoint, write_weights
from losa_deploy.text.pretokenizers import rules

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
STAMP = "losa-source.json"
"""Written last into a converted folder: hash of the GGUF file and versions of this program."""
CONVERTER = 2
"""Raise when converted folders change within a version of the program."""
TOKEN_IDS = ("bos", "eos", "unknown", "padding", "eot", "eom")
TOKENIZER_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")


@dataclass(frozen=True)
class GgufHeader:
    """What a run needs to know before the weights are read."""

    architecture: str
    license: str
    shapes: dict[str, tuple[int, ...]]
    """Tensor name as in the file → shape [out, in]."""

    @property
    def parameters(self) -> int:
        total = 0
        for shape in self.shapes.values():
            count = 1
            for size in shape:
                count *= size
            total += count
        return total


def read_header(path: Path) -> GgufHeader:
    """Read a GGUF header; `InputError` if the file is damaged or of an unsupported architecture."""
    with open_header(path) as found:
        shapes = {name: tuple(reversed(dims)) for name, dims in found.shapes.items()}
        header = GgufHeader(found.text(ARCHITECTURE), found.text(LICENSE), shapes)
    find_family({"model_type": header.architecture})
    return header


def is_gguf_name(name: str) -> bool:
    """Whether a file or hub id is called like a GGUF file."""
    return name.lower().endswith(SUFFIX)


def plain_name(name: str) -> str:
    """The name of a GGUF file without suffix and type: `Model-1B` of `Model-1B.Q4_0.gguf`."""
    return re.sub(r"(\.(I?Q\w+|B?F\d+))?\.gguf$", "", name, flags=re.IGNORECASE)


def header_shapes(path: Path) -> tuple[Mapping[str, tuple[int, int]], Mapping[str, tuple[int, int]]]:
    """Shapes (out, in) of the block linears, and of embedding and head, from the header only."""
    matrices = {name: (s[0], s[1]) for name, s in read_header(path).shapes.items() if len(s) == 2}
    linears = {name: shape for name, shape in matrices.items() if name.startswith(BLOCKS)}
    return linears, {name: shape for name, shape in matrices.items() if name not in linears}


def convert_gguf(
    path: Path, identity: str, folder: Path, progress: Progress, warn: Callable[[str], None]
) -> tuple[Checkpoint, SourceRecord]:
    """Convert `path` into `folder` (f32), or reuse it if it was made from the same file and is intact.

    `warn` hears of damage.
    """
    progress(0, 4, f"hashing {path.name}")
    header = read_header(path)
    digest = sha256_file(path)
    record = SourceRecord(id=identity, files={path.name: digest}, license=header.license)
    stamp = json.dumps({"sha256": digest, "tool_version": __version__, "converter": CONVERTER}) + "\n"
    usable = _stamped(folder, stamp)
    if usable and (found := damage(folder)):
        warn(f"{found}: converting {path.name} again.")
        usable = False
    if not usable:
        require_disk(folder, 4 * header.parameters, "The converted model")
        partial = sibling(folder, ".partial")
        remove(partial)
        partial.mkdir(parents=True)
        try:
            with _read_once():
                _convert(path, partial, progress)
            (partial / STAMP).write_text(stamp, "utf-8")
            remove(folder)
            partial.rename(folder)
            seal(folder)
        finally:
            remove(partial)
    progress(4, 4, identity)
    return Checkpoint.open(folder), record


@contextmanager
def _read_once() -> Iterator[None]:
    """Keep what `gguf` makes of a file and an architecture for those who ask again.

    transformers asks three times for the header, which takes seconds with a large vocabulary, and once per
    module for the names of tensors.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lru_cache(lambda path: reader(path))  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = lru_cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names  # type: ignore[misc]


def _stamped(folder: Path, stamp: str) -> bool:
    try:
        return (folder / STAMP).read_text("utf-8") == stamp
    except OSError:
        return False


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    """Transformers refuses to save a GGUF-loaded model, so the parts are written one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    progress(1, 4, f"tokenizer of {path.name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path.parent,
            gguf_file=path.name,
            local_files_only=True,
            trust_remote_code=False,
            # Written out, because transformers 4 would add token type ids, which no decoder takes.
            model_input_names=["input_ids", "attention_mask"],
        )
        progress(2, 4, f"weights of {path.name}")
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"transformers cannot read {path}: {reason}.",
            hint="Use the model's original Hugging Face folder instead.",
        ) from error
    progress(3, 4, f"writing {folder.name}")
    tokenizer.save_pretrained(folder)
    _keep_tokenizer(path, folder)
    model.generation_config.save_pretrained(folder)
    config = _portable_config(model.config.to_diff_dict(), type(model).__name__)
    _write_json(folder / "config.json", config)
    _portable_tokenizer(folder / "tokenizer_config.json")
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    write_weights(folder, ((name, tensor.contiguous()) for name, tensor in tensors.items()))


def _keep_tokenizer(path: Path, folder: Path) -> None:
    """What transformers drops: the rules that split text, token types, scores and flags.

    Read by the `gguf` package, because transformers has had it read the file already (`_read_once`).
    The splitting rules that llama.cpp knows by name are put into tokenizer.json, so that a text becomes
    the tokens the model was trained on; transformers takes those of GPT-2 for most models.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(path))
    found = {key: _value(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre", "scores")}
    types = _value(reader, "tokenizer.ggml.token_type")
    ids = {name: _value(reader, f"tokenizer.ggml.{name}_token_id") for name in TOKEN_IDS}
    flags = {name: _value(reader, f"tokenizer.ggml.{name}") for name in TOKENIZER_FLAGS}
    document = {
        **{key: value for key, value in found.items() if value is not None},
        "token_types": _runs(types if isinstance(types, list) else []),
        "ids": {name: value for name, value in ids.items() if value is not None},
        "flags": {name: value for name, value in flags.items() if value is not None},
    }
    text = json.dumps(document, sort_keys=True, ensure_ascii=False)
    (folder / GGUF_TOKENIZER_FILE).write_text(text + "\n", "utf-8")
    steps = rules(str(found["pre"]))
    if steps is not None and found["model"] == "gpt2" and (folder / "tokenizer.json").is_file():
        tokenizer: dict[str, object] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        tokenizer["pre_tokenizer"] = steps
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")


def _value(reader: GGUFReader, key: str) -> object:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _runs(values: list[int]) -> list[list[int]]:
    """Equal neighbours as [value, times]."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def _portable_config(config: dict[str, object], architecture: str) -> dict[str, object]:
    """`config.json` without traces of this machine or of GGUF, readable by transformers 4 and 5."""
    kept = {k: v for k, v in config.items() if "name_or_path" not in k and k != "quantization_config"}
    rope = kept.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        kept["rope_theta"] = rope["rope_theta"]
    return kept | {"architectures": [architecture], "dtype": "float32"}


def _portable_tokenizer(path: Path) -> None:
    """The class name of transformers 5 is unknown to version 4; both know the older one."""
    config = json.loads(path.read_text("utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    _write_json(path, config)


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", "utf-8")
