"""The tokenizer of a Hugging Face folder as llama.cpp stores one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from losa_deploy.errors import InputError
from losa_deploy.sources.checkpoint import GGUF_TOKENIZER_FILE

from .vocabulary import (
    CONTROL,
    NO_RULES,
    UNUSED,
    USER_DEFINED,
    Document,
    Vocabulary,
    from_bpe,
    from_llama_json,
    from_sentencepiece,
    padding,
    part_of,
    read_json,
    tokenizer_kind,
)

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
"""Special token → its part of the GGUF key (one of them is misspelt in the format)."""


def check_tokenizer(folder: Path) -> None:
    """Raise `InputError` if the folder has no tokenizer that llama.cpp can have; reads headers only."""
    if (folder / "tokenizer.json").is_file():
        tokenizer_kind(folder, read_json(folder / "tokenizer.json"))
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
        vocabulary = from_sentencepiece(folder, {})
    elif tokenizer_kind(folder, document) == "gpt2":
        vocabulary = from_bpe(folder, document)
    elif (folder / "tokenizer.model").is_file():
        vocabulary = from_sentencepiece(folder, document)
    else:
        vocabulary = from_llama_json(folder, document)
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
    taken = set(vocabulary.tokens)
    unused = tuple(padding(index, taken) for index in range(count, size))
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
        return read_json(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return None
    from losa_deploy.pretrained import load_hf_tokenizer

    inner = load_hf_tokenizer(folder)
    try:
        document = json.loads(inner.backend_tokenizer.to_str())
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"transformers cannot read the tokenizer of {folder}: {error}.",
            hint="Save the tokenizer with transformers, so that it has a tokenizer.json.",
        ) from None
    assert isinstance(document, dict)
    return document


def _with_special(folder: Path, vocabulary: Vocabulary, config: Document) -> Vocabulary:
    """Special tokens, what the tokenizer puts around a text, and the chat template."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
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
    for document in (read_json(path) if path.is_file() else {}, config):
        value = document.get("eos_token_id")
        found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return list(dict.fromkeys(found))


def _around(folder: Path, ids: Mapping[str, int], settings: Document, model: str) -> dict[str, bool]:
    """Whether bos and eos are added: what transformers does with a letter, else what the files say."""
    from losa_deploy.text.tokenizer import load_tokenizer

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
    source = read_json(path) if path.is_file() else {}
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
    ids = {k: v for k, v in part_of(source, "ids").items() if isinstance(v, int) and v < count}
    flags = {key: bool(value) for key, value in part_of(source, "flags").items()}
    return replace(vocabulary, ids={**vocabulary.ids, **ids}, flags={**vocabulary.flags, **flags})


def _first(value: object) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else None
