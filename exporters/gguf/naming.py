"""Names of GGUF files and of the models in them, after the naming convention of the format."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SIZE = re.compile(r"\d+(\.\d+)?[KMBT]", re.IGNORECASE)
_VERSION = re.compile(r"v\d+(\.\d+)*", re.IGNORECASE)
_SUFFIX = re.compile(r"(\s*\([^)]*\)$)|(\.gguf$)|([.-](I?Q\d\w*|B?F(16|32)|FP16)$)", re.IGNORECASE)


@dataclass(frozen=True)
class Name:
    """The parts of a model's name."""

    full: str
    base: str
    size: str
    """As in the name, or from the number of parameters."""
    fine: str
    """What follows the size, e.g. `Instruct`."""
    version: str
    organization: str
    """The owner on the hub, "" if the source is not from there."""
    repository: str
    """`owner/name` on the hub, or ""."""


def model_name(source: str, parameters: int) -> Name:
    """Split the identity of a source, e.g. `HuggingFaceTB/SmolLM2-135M-Instruct`."""
    from gguf.utility import model_weight_count_rounded_notation

    plain = source.strip()
    while (shorter := _SUFFIX.sub("", plain)) != plain:
        plain = shorter
    owner, slash, last = plain.rpartition("/")
    words = [word for word in re.split(r"[\s_-]+", last) if word] or ["model"]
    size = next((i for i, word in enumerate(words) if i and _SIZE.fullmatch(word)), None)
    found = words[size] if size is not None else model_weight_count_rounded_notation(parameters)
    base, rest = (words, []) if size is None else (words[:size], words[size + 1 :])
    version = next((word for word in rest if _VERSION.fullmatch(word)), "")
    fine = "-".join(word for word in rest if word != version)
    hub = bool(slash) and "/" not in owner and bool(owner)
    return Name(
        " ".join(words), "-".join(base), found, fine, version, owner if hub else "", plain if hub else ""
    )


def file_name(source: str, parameters: int, label: str) -> str:
    """`<Base>-<Size>[-<Fine>][-<Version>]-<TYPE>.gguf`."""
    from gguf.utility import naming_convention

    name = model_name(source, parameters)
    stem = naming_convention(None, name.base, name.fine or None, name.version or None, name.size, label)
    return re.sub(r"[^\w.+-]", "-", stem) + ".gguf"
