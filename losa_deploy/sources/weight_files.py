"""Which file each tensor of a Hugging Face folder comes from, decided as transformers decides it.

`model.safetensors` wins over an index beside it. With an index, every tensor of the shards that it names
counts, whether it lists the tensor or not, and of two shards with the same tensor the later name wins.
Everything that reads weights asks here, so that no two parts of a run read different files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from losa_deploy.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor → its file, in the order of files and then of their headers.

    Raises `InputError` if there are no safetensors weights, a shard is missing, or the index says of a
    tensor that it is in a shard that does not hold it.
    """
    single = folder / SINGLE_FILE
    if single.is_file():
        return dict.fromkeys(_keys(single), single)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise _no_weights(folder)
    listed = _weight_map(index)
    found: dict[str, Path] = {}
    for name in sorted(set(listed.values())):
        found |= dict.fromkeys(_keys(folder / name), folder / name)
    for tensor, name in listed.items():
        if tensor not in found:
            raise _broken(index, f"it lists {tensor} in {name}, which does not hold it")
        if found[tensor].name != name:
            raise _broken(index, f"it lists {tensor} in {name}, but the tensor is in {found[tensor].name}")
    return found


def files_used(folder: Path) -> tuple[str, ...]:
    """Names of the files that decide the weights: the index, if it is in use, and the safetensors files."""
    names = sorted({path.name for path in weight_files(folder).values()})
    return tuple(names) if (folder / SINGLE_FILE).is_file() else (INDEX_FILE, *names)


def _weight_map(index: Path) -> Mapping[str, str]:
    """The parsed index: tensor → name of a file that is beside it."""
    try:
        document = json.loads(index.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(index, f"it cannot be read as JSON ({error})") from None
    document = document if isinstance(document, dict) else {}
    found = document.get("weight_map")
    if not isinstance(found, dict) or not found or "metadata" not in document:  # transformers asks for both
        raise _broken(index, f"it has no {'metadata' if found else 'weight_map'}")
    for tensor, name in found.items():
        # A name with a folder in it could lead anywhere on this machine.
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise _broken(index, f"it lists {tensor} in {name!r}, expected the name of a file beside it")
    missing = sorted({name for name in found.values() if not (index.parent / name).is_file()})
    if missing:
        raise _broken(index, f"it names {missing[0]}, which is not there ({len(missing)} missing)")
    return found


def _keys(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors: {error}.", hint="Copy it again.") from None


def _no_weights(folder: Path) -> InputError:
    pickled = any(folder.glob("*.bin"))
    return InputError(
        f"{folder} has no {SINGLE_FILE}" + (" (only pickled .bin weights)." if pickled else "."),
        hint="Save the model with `save_pretrained(..., safe_serialization=True)`.",
    )


def _broken(index: Path, what: str) -> InputError:
    return InputError(f"{index} does not describe these weights: {what}.", hint="Download the model again.")
