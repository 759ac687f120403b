"""Tokens, merges and scores of the two kinds of tokenizer that llama.cpp's Llama-shaped models have."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.errors import InputError
from losa_deploy.text.pretokenizers import recognise

from .architectures import ONNX_HINT
from .sentencepiece import read_sentencepiece

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of llama.cpp."""
NO_RULES = (
    "The rules by which the tokenizer splits text are none that llama.cpp has by name; its default is used, "
    "and some texts may become other tokens."
)
PREFIX_NOTE = (
    "llama.cpp puts a space before a text that starts with one, and before text after a special token; this "
    "tokenizer does not."
)
Document = Mapping[str, object]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, ready to be written."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece)."""
    pre: str
    """Name of the pre-tokenizer."""
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    ids: Mapping[str, int] = field(default_factory=dict)
    """Part of the key, e.g. `bos` → token."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """`add_bos_token`, `add_eos_token`, `add_space_prefix`, `remove_extra_whitespaces`."""
    template: str = ""
    notes: tuple[str, ...] = ()

    def write(self, writer: GGUFWriter) -> None:
        """Add the keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, token in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
        for name, value in self.flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        if self.template:
            writer.add_chat_template(self.template)


def tokenizer_kind(folder: Path, document: Document) -> str:
    """`gpt2` or `llama`; `InputError` for another kind."""
    model = part_of(document, "model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "BPE":
        return "llama" if model.get("byte_fallback") else "gpt2"
    raise InputError(
        f"The tokenizer of {folder} is of the kind {kind!r}; this exporter writes BPE and SentencePiece BPE.",
        hint=ONNX_HINT,
    )


def from_bpe(folder: Path, document: Document) -> Vocabulary:
    """Byte-level BPE."""
    tokens, types = _tokens(document)
    pre = recognise(document)
    notes = () if pre else (NO_RULES,)
    merges = tuple(f"{left} {right}" for left, right in _pairs(document))
    return Vocabulary("gpt2", pre or "default", tuple(tokens), tuple(types), merges, notes=notes)


def from_llama_json(folder: Path, document: Document) -> Vocabulary:
    """SentencePiece BPE that only exists as tokenizer.json: the order of the merges becomes the scores."""
    tokens, types = _tokens(document)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(document)):
        ranks.setdefault(left + right, rank)
    last = float(-len(ranks) - 1)
    unknown = part_of(document, "model").get("unk_token")
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = UNKNOWN
        elif types[index] == NORMAL and _is_byte(token):
            types[index] = BYTE
    scores = tuple(float(-ranks[token]) if token in ranks else last for token in tokens)
    flags = {"add_space_prefix": _prefix(document)}
    return Vocabulary(
        "llama",
        "default",
        tuple(tokens),
        tuple(types),
        scores=scores,
        flags=flags,
        notes=_prefix_notes(document),
    )


def from_sentencepiece(folder: Path, document: Document) -> Vocabulary:
    """A `tokenizer.model`, and the tokens that the other files add to it."""
    model = read_sentencepiece(folder / "tokenizer.model")
    if not model.bpe:
        raise InputError(
            f"{folder / 'tokenizer.model'} is no BPE model, which is what llama.cpp's Llama tokenizer reads.",
            hint=ONNX_HINT,
        )
    tokens, types = [p.text for p in model.pieces], [p.type for p in model.pieces]
    scores = [p.score for p in model.pieces]
    added = _added(folder, document)
    taken = {*tokens, *(token for token, _ in added.values())}
    for index, (token, kind) in sorted(added.items()):
        while len(tokens) <= index:
            tokens.append(padding(len(tokens), taken))
            types.append(UNUSED)
            scores.append(-1e4)
        if types[index] in (NORMAL, USER_DEFINED, UNUSED):
            tokens[index], types[index] = token, kind
    flags = {"add_space_prefix": _prefix(document) if document else model.prefix}
    if model.collapse:
        flags["remove_extra_whitespaces"] = True
    notes = _prefix_notes(document)
    if model.rules != "identity":
        notes += (f"The tokenizer normalizes characters by {model.rules!r}; llama.cpp does not.",)
    return Vocabulary(
        "llama", "default", tuple(tokens), tuple(types), scores=tuple(scores), flags=flags, notes=notes
    )


def _tokens(document: Document) -> tuple[list[str], list[int]]:
    """Tokens by id with their types; ids without a token are unused."""
    vocab = part_of(part_of(document, "model"), "vocab")
    found: dict[int, tuple[str, int]] = {int(str(i)): (token, NORMAL) for token, i in vocab.items()}
    added = document.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        kind = CONTROL if token.get("special") else USER_DEFINED
        found[int(token["id"])] = (str(token["content"]), kind)
    size = max(found, default=-1) + 1
    taken = {token for token, _ in found.values()}
    rows = [found.get(index) or (padding(index, taken), UNUSED) for index in range(size)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def padding(index: int, taken: Collection[str]) -> str:
    """Name of an id without a token, by llama.cpp's convention; none of those `taken`, or it would abort."""
    name = f"[PAD{index}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _pairs(document: Document) -> list[tuple[str, str]]:
    merges = part_of(document, "model").get("merges")
    pairs = [
        m.split(" ", 1) if isinstance(m, str) else m for m in (merges if isinstance(merges, list) else [])
    ]
    return [(str(left), str(right)) for left, right in pairs]


def _added(folder: Path, document: Document) -> dict[int, tuple[str, int]]:
    """Id → token and type of what was added to the vocabulary."""
    added = document.get("added_tokens")
    if isinstance(added, list):
        return {
            int(t["id"]): (str(t["content"]), CONTROL if t.get("special") else USER_DEFINED) for t in added
        }
    path = folder / "added_tokens.json"
    tokens = read_json(path) if path.is_file() else {}
    return {int(str(index)): (token, USER_DEFINED) for token, index in tokens.items()}


def _prefix(document: Document) -> bool:
    """True if a space is put before the text."""
    step = _prefixing(document)
    default = "always" if step.get("add_prefix_space", True) else "never"
    return bool(step) and step.get("prepend_scheme", default) != "never"


def _prefix_notes(document: Document) -> tuple[str, ...]:
    """A Metaspace step is not quite what SentencePiece, and llama.cpp with it, does."""
    if _prefixing(document).get("type") != "Metaspace" or not _prefix(document):
        return ()
    return (PREFIX_NOTE,)


def _prefixing(document: Document) -> Document:
    """The step that can put a space before the text; empty if there is none."""
    for step in (part_of(document, "normalizer"), part_of(document, "pre_tokenizer")):
        inner = step.get("normalizers") or step.get("pretokenizers") or [step]
        for part in inner if isinstance(inner, list) else []:
            if isinstance(part, Mapping) and part.get("type") in ("Prepend", "Metaspace"):
                return part
    return {}


def _is_byte(token: str) -> bool:
    if len(token) != 6 or not token.startswith("<0x") or token[-1] != ">":
        return False
    return all(digit in "0123456789ABCDEFabcdef" for digit in token[3:5])


def part_of(document: Document, key: str) -> Document:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def read_json(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.", hint="Copy the file again.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object.", hint="Copy the file again.")
    return document
