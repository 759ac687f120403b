"""Tokenizer access: encode, decode, chat template, end tokens, and incremental decoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from losa_deploy.text.gguf import GgufVocabulary

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""


class Tokenizer:
    """A model's tokenizer, with the end tokens its configuration files name."""

    def __init__(self, inner: PreTrainedTokenizerBase | GgufVocabulary, folder: Path) -> None:
        """`folder` holds the configuration files; of a GGUF file's own tokenizer it is the file."""
        self._inner = inner
        self.folder = folder

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`; `special` adds what the model expects around it (e.g. bos)."""
        return [int(i) for i in self._inner.encode(text, add_special_tokens=special)]

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless `special`."""
        text = self._inner.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    @property
    def has_chat_template(self) -> bool:
        """True if the model folder says how a conversation is written."""
        return bool(self._inner.chat_template)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation (`role`, `content`) up to where the assistant's reply starts.

        Raises `InputError` if the model has no chat template or its template refuses the messages.
        """
        if not self.has_chat_template:
            raise InputError(
                f"The model in {self.folder} has no chat template (neither chat_template.jinja nor "
                "`chat_template` in tokenizer_config.json).",
                hint="Use `losa-deploy generate` with a plain prompt.",
            )
        from jinja2 import TemplateError

        try:
            ids = self._inner.apply_chat_template(
                [dict(m) for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            roles = ", ".join(m.get("role", "?") for m in messages)
            raise InputError(
                f"The chat template of {self.folder} refused the conversation ({roles}): {error}.",
                hint="Leave out --system if the model takes no system message.",
            ) from None
        return [i for i in ids if isinstance(i, int)]

    @property
    def size(self) -> int:
        """Number of token ids the tokenizer knows, added ones included."""
        return len(self._inner)

    @cached_property
    def tokens(self) -> tuple[str | None, ...]:
        """Tokens by id, as the files write them; None for ids without one, which never come last."""
        found = list(self._inner.convert_ids_to_tokens(list(range(self.size))))
        while found and found[-1] is None:
            found.pop()
        return tuple(found)

    @property
    def bos_id(self) -> int | None:
        """The token a text starts with, if the tokenizer has one."""
        found: int | None = self._inner.bos_token_id
        return found

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply: generation_config.json, config.json, then the tokenizer's own.

        Of a GGUF file's tokenizer those that llama.cpp ends at.
        """
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = _read_object(self.folder / name).get("eos_token_id")
            found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if self._inner.eos_token_id is not None:
            found.append(int(self._inner.eos_token_id))
        if self.folder.is_file():
            found += self._inner.end_ids()
        return tuple(dict.fromkeys(found))

    @property
    def separator_id(self) -> int | None:
        """The token put between documents: the tokenizer's eos, else the model's, else bos."""
        if self._inner.eos_token_id is not None:
            return int(self._inner.eos_token_id)
        return self.eos_ids[0] if self.eos_ids else self.bos_id


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: local files only, no code from the folder is run.

    A GGUF file, and a folder that has one and no tokenizer files, bring their tokenizer with them.
    Raises `InputError` if there is none or it cannot be read.
    """
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in names):
        from losa_deploy.text.gguf import GgufVocabulary, vocabulary_file

        file = vocabulary_file(folder)
        if file is not None:
            return Tokenizer(GgufVocabulary(file), file)
        raise InputError(
            f"{folder} has no tokenizer (none of {', '.join(names)}).",
            hint="Copy tokenizer.json and tokenizer_config.json of the original model into it.",
        )
    from losa_deploy.pretrained import load_hf_tokenizer

    inner = load_hf_tokenizer(folder)
    # Corpora are encoded whole; the length of what a model is given is checked where it is given.
    inner.model_max_length = 2**63 - 1
    return Tokenizer(inner, folder)


class StreamDecoder:
    """Turns ids fed one by one into text, holding back what a later id may still change.

    Ids are decoded together with those before them, because many tokenizers drop the leading
    space of the first id; text that ends in an incomplete UTF-8 sequence waits for the rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, token: int) -> str:
        """Text that became certain with this id; may be empty."""
        self._pending.append(token)
        return self._take(final=False)

    def flush(self) -> str:
        """What is left, including an incomplete character as a replacement character."""
        return self._take(final=True)

    def decode_all(self, tokens: Iterable[int]) -> str:
        """Feed all ids and flush."""
        return "".join([self.feed(t) for t in tokens]) + self.flush()

    def _take(self, *, final: bool) -> str:
        known = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        if not final and (text.endswith(UNFINISHED) or len(text) <= len(known)):
            return ""
        self._context, self._pending = self._pending or self._context, []
        return text[len(known) :]


def _read_object(path: Path) -> Mapping[str, object]:
    """A JSON object, or an empty one if the file is missing or something else."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
