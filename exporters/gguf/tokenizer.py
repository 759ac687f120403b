"""The tokenizer of a Hugging Face folder as llama.cpp stores one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.checkpoint import GGUF_TOKENIZER_FILE
from losa_deploy.errors import InputError
from losa_deploy.pretokenizers import recognise

from .architecture import ONNX_HINT
from .sentencepiece import read_sentencepiece

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Token types of llama.cpp."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""Special token → its part of the GGUF key (one of them is misspelt in the format)."""
NO_RULES = (
    "The rules by which the tokenizer splits text are none that llama.cpp has by name; its default is used, "
    "and some texts may become other tokens."
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


def check_tokenizer(folder: Path) -> None:
    """Raise `InputError` if the folder has no tokenizer that llama.cpp can have; reads headers only."""
    if (folder / "tokenizer.json").is_file():
        _kind(folder, _json(folder / "tokenizer.json"))
    elif not (folder / "tokenizer.model").is_file() and not (folder / "vocab.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json).",
            hint="Put the model's tokenizer files beside its weights.",
        )


def read_vocabulary(folder: Path, size: int, config: Document) -> Vocabulary:
    """The tokenizer of the model in `folder` with `size` rows of embedding.

    Raises `InputError` if llama.cpp has no such tokenizer, or if it has more tokens than rows.
    """
    document = _document(folder)
    if document is None:
        vocabulary = _from_sentencepiece(folder, {})
    elif _kind(folder, document) == "gpt2":
        vocabulary = _from_bpe(folder, document)
    elif (folder / "tokenizer.model").is_file():
        vocabulary = _from_sentencepiece(folder, document)
    else:
        vocabulary = _from_llama_json(folder, document)
    return _as_in_source(folder, _with_special(folder, _fitted(folder, vocabulary, size), config))


def _fitted(folder: Path, vocabulary: Vocabulary, size: int) -> Vocabulary:
    """As many tokens as the embedding has rows: unused ones are added, added ones without a row left out."""
    count = len(vocabulary.tokens)
    if any(kind not in (CONTROL, USER_DEFINED) for kind in vocabulary.types[size:]):
        raise InputError(
            f"The tokenizer of {folder} has {count} tokens, the model's embedding {size} rows.",
            hint="Check that the tokenizer belongs to these weights.",
        )
    notes = vocabulary.notes
    if count > size:
        names = ", ".join(vocabulary.tokens[size:][:3])
        notes += (f"Tokens beyond the {size} rows of the embedding are left out: {names}.",)
    unused = tuple(f"[PAD{index}]" for index in range(count, size))
    return replace(
        vocabulary,
        tokens=vocabulary.tokens[:size] + unused,
        types=vocabulary.types[:size] + (UNUSED,) * len(unused),
        scores=vocabulary.scores[:size] + (-1e4,) * len(unused) if vocabulary.scores else (),
        notes=notes,
    )


def _document(folder: Path) -> Document | None:
    """The parsed tokenizer.json, made from vocab.json where there is none; None for SentencePiece alone."""
    if (folder / "tokenizer.json").is_file():
        return _json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        document = json.loads(inner.backend_tokenizer.to_str())
    except (ValueError, OSError, AttributeError, ImportError) as error:
        raise InputError(
            f"transformers cannot read the tokenizer of {folder}: {error}.",
            hint="Save the tokenizer with transformers, so that it has a tokenizer.json.",
        ) from None
    assert isinstance(document, dict)
    return document


def _kind(folder: Path, document: Document) -> str:
    """`gpt2` or `llama`; `InputError` for another kind."""
    model = _part(document, "model")
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind == "BPE":
        return "llama" if model.get("byte_fallback") else "gpt2"
    raise InputError(
        f"The tokenizer of {folder} is of the kind {kind!r}; this exporter writes BPE and SentencePiece BPE.",
        hint=ONNX_HINT,
    )


def _tokens(document: Document) -> tuple[list[str], list[int]]:
    """Tokens by id with their types; ids without a token are unused."""
    vocab = _part(_part(document, "model"), "vocab")
    found: dict[int, tuple[str, int]] = {int(str(i)): (token, NORMAL) for token, i in vocab.items()}
    added = document.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        kind = CONTROL if token.get("special") else USER_DEFINED
        found[int(token["id"])] = (str(token["content"]), kind)
    size = max(found, default=-1) + 1
    rows = [found.get(index, (f"[PAD{index}]", UNUSED)) for index in range(size)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def _pairs(document: Document) -> list[tuple[str, str]]:
    merges = _part(document, "model").get("merges")
    pairs = [
        m.split(" ", 1) if isinstance(m, str) else m for m in (merges if isinstance(merges, list) else [])
    ]
    return [(str(left), str(right)) for left, right in pairs]


def _from_bpe(folder: Path, document: Document) -> Vocabulary:
    """Byte-level BPE."""
    tokens, types = _tokens(document)
    pre = recognise(document)
    notes = () if pre else (NO_RULES,)
    merges = tuple(f"{left} {right}" for left, right in _pairs(document))
    return Vocabulary("gpt2", pre or "default", tuple(tokens), tuple(types), merges, notes=notes)


def _from_llama_json(folder: Path, document: Document) -> Vocabulary:
    """SentencePiece BPE that only exists as tokenizer.json: the order of the merges becomes the scores."""
    tokens, types = _tokens(document)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(document)):
        ranks.setdefault(left + right, rank)
    last = float(-len(ranks) - 1)
    unknown = _part(document, "model").get("unk_token")
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = UNKNOWN
        elif types[index] == NORMAL and _is_byte(token):
            types[index] = BYTE
    scores = tuple(float(-ranks[token]) if token in ranks else last for token in tokens)
    flags = {"add_space_prefix": _prefix(document)}
    return Vocabulary("llama", "default", tuple(tokens), tuple(types), scores=scores, flags=flags)


def _from_sentencepiece(folder: Path, document: Document) -> Vocabulary:
    """A `tokenizer.model`, and the tokens that the other files add to it."""
    model = read_sentencepiece(folder / "tokenizer.model")
    if not model.bpe:
        raise InputError(
            f"{folder / 'tokenizer.model'} is no BPE model, which is what llama.cpp's Llama tokenizer reads.",
            hint=ONNX_HINT,
        )
    tokens, types = [p.text for p in model.pieces], [p.type for p in model.pieces]
    scores = [p.score for p in model.pieces]
    for index, (token, kind) in sorted(_added(folder, document).items()):
        while len(tokens) <= index:
            tokens.append(f"[PAD{len(tokens)}]")
            types.append(UNUSED)
            scores.append(-1e4)
        if types[index] in (NORMAL, USER_DEFINED, UNUSED):
            tokens[index], types[index] = token, kind
    flags = {"add_space_prefix": _prefix(document) if document else model.prefix}
    if model.collapse:
        flags["remove_extra_whitespaces"] = True
    return Vocabulary("llama", "default", tuple(tokens), tuple(types), scores=tuple(scores), flags=flags)


def _added(folder: Path, document: Document) -> dict[int, tuple[str, int]]:
    """Id → token and type of what was added to the vocabulary."""
    added = document.get("added_tokens")
    if isinstance(added, list):
        return {
            int(t["id"]): (str(t["content"]), CONTROL if t.get("special") else USER_DEFINED) for t in added
        }
    path = folder / "added_tokens.json"
    tokens = _json(path) if path.is_file() else {}
    return {int(str(index)): (token, USER_DEFINED) for token, index in tokens.items()}


def _prefix(document: Document) -> bool:
    """True if a space is put before the text."""
    steps = [_part(document, "normalizer"), _part(document, "pre_tokenizer")]
    for step in steps:
        inner = step.get("normalizers") or step.get("pretokenizers") or [step]
        for part in inner if isinstance(inner, list) else []:
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            if part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and scheme != "never"):
                return True
    return False


def _is_byte(token: str) -> bool:
    if len(token) != 6 or not token.startswith("<0x") or token[-1] != ">":
        return False
    return all(digit in "0123456789ABCDEFabcdef" for digit in token[3:5])


def _with_special(folder: Path, vocabulary: Vocabulary, config: Document) -> Vocabulary:
    """Special tokens, what the tokenizer puts around a text, and the chat template."""
    path = folder / "tokenizer_config.json"
    settings = _json(path) if path.is_file() else {}
    ids: dict[str, int] = {}
    index = {token: i for i, token in reversed(list(enumerate(vocabulary.tokens)))}
    for name, key in SPECIAL.items():
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        found = index.get(token) if isinstance(token, str) else _first(config.get(f"{name}_token_id"))
        if found is not None and 0 <= found < len(vocabulary.tokens):
            ids[key] = found
    others = [i for i in _ends(folder, config) if i != ids.get("eos") and i < len(vocabulary.tokens)]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    flags = {**vocabulary.flags, **_around(folder, ids, settings, vocabulary.model)}
    return replace(vocabulary, ids=ids, flags=flags, template=_template(folder, settings))


def _ends(folder: Path, config: Document) -> list[int]:
    """Tokens that end a reply, as the configuration files name them."""
    path = folder / "generation_config.json"
    found: list[int] = []
    for document in (_json(path) if path.is_file() else {}, config):
        value = document.get("eos_token_id")
        found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return list(dict.fromkeys(found))


def _around(folder: Path, ids: Mapping[str, int], settings: Document, model: str) -> dict[str, bool]:
    """Whether bos and eos are added: what transformers does with a letter, else what the files say."""
    from losa_deploy.text import load_tokenizer

    try:
        encoded = load_tokenizer(folder).encode("a")
    except InputError:
        bos, eos = settings.get("add_bos_token"), settings.get("add_eos_token")
        return {"add_bos_token": model == "llama" if bos is None else bool(bos), "add_eos_token": bool(eos)}
    return {
        "add_bos_token": len(encoded) > 1 and encoded[0] == ids.get("bos"),
        "add_eos_token": len(encoded) > 1 and encoded[-1] == ids.get("eos"),
    }


def _template(folder: Path, settings: Document) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {
            str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, Mapping)
        }
        found = named.get("default")
    return found if isinstance(found, str) else ""


def _as_in_source(folder: Path, vocabulary: Vocabulary) -> Vocabulary:
    """A folder made from a GGUF file keeps what that file says about the same tokens."""
    path = folder / GGUF_TOKENIZER_FILE
    source = _json(path) if path.is_file() else {}
    if source.get("model") != vocabulary.model:
        return vocabulary
    count = len(vocabulary.tokens)
    runs, scores, pre = source.get("token_types"), source.get("scores"), source.get("pre")
    types = [kind for kind, times in runs for _ in range(times)] if isinstance(runs, list) else []
    if isinstance(pre, str) and pre:
        vocabulary = replace(vocabulary, pre=pre, notes=tuple(n for n in vocabulary.notes if n != NO_RULES))
    if len(types) == count:
        vocabulary = replace(vocabulary, types=tuple(types))
    if vocabulary.scores and isinstance(scores, list) and len(scores) == count:
        vocabulary = replace(vocabulary, scores=tuple(scores))
    ids = {k: v for k, v in _part(source, "ids").items() if isinstance(v, int) and v < count}
    flags = {key: bool(value) for key, value in _part(source, "flags").items()}
    return replace(vocabulary, ids={**vocabulary.ids, **ids}, flags={**vocabulary.flags, **flags})


def _first(value: object) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None


def _part(document: Document, key: str) -> Document:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _json(path: Path) -> dict[str, object]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.", hint="Copy the file again.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object.", hint="Copy the file again.")
    return document
