"""The tokenizer inside of a GGUF file, as llama.cpp reads it, for files without tokenizer.json beside them.

llama.cpp's own vocabulary is taken because the model runs there: transformers reads the same keys, but
drops the rules that split text, knows fewer models, and refuses packed files.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from losa_deploy.bindings.llama_cpp import load, logged_errors, refusal
from losa_deploy.errors import InputError
from losa_deploy.gguf.check import check_gguf
from losa_deploy.gguf.view import is_packed, standard_view

NO_VOCABULARY = 0
"""llama.cpp's number of files without a tokenizer."""


def vocabulary_file(path: Path) -> Path | None:
    """The file that a tokenizer can be read from: `path` itself, or the first GGUF file of a folder."""
    return path if path.is_file() else next(iter(sorted(path.glob("*.gguf"))), None)


class GgufVocabulary:
    """What `losa_deploy.text.tokenizer.Tokenizer` asks of a transformers tokenizer, answered by llama.cpp."""

    def __init__(self, path: Path) -> None:
        """Raises `InputError` if llama.cpp cannot read the file or it has no tokenizer."""
        self._library = load()
        parameters = self._library.llama_model_default_params()
        parameters.vocab_only = True
        parameters.load_mode = self._library.LLAMA_LOAD_MODE_NONE
        with _readable(path) as file, logged_errors() as lines:
            model = self._library.llama_model_load_from_file(str(file).encode(), parameters)
        if not model:
            raise refusal(path, lines)
        weakref.finalize(self, self._library.llama_model_free, model)
        self._vocabulary = self._library.llama_model_get_vocab(model)
        if self._library.llama_vocab_type(self._vocabulary) == NO_VOCABULARY:
            raise InputError(
                f"{path} has no tokenizer.",
                hint="Give a folder with the model's tokenizer.json, or another file.",
            )
        template = self._library.llama_model_chat_template(model, None)
        self.chat_template = template.decode("utf-8", "replace") if template else None
        self.bos_token_id = self._id(self._library.llama_vocab_bos)
        self.eos_token_id = self._id(self._library.llama_vocab_eos)

    def __len__(self) -> int:
        return int(self._library.llama_vocab_n_tokens(self._vocabulary))

    def end_ids(self) -> tuple[int, ...]:
        """All tokens that llama.cpp ends a reply at."""
        ends = self._library.llama_vocab_is_eog
        return tuple(token for token in range(len(self)) if ends(self._vocabulary, token))

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Tokens as the file has them; None for ids that it only fills up with."""
        return [self._token(token) for token in ids]

    def _token(self, token: int) -> str | None:
        if (
            self._library.llama_vocab_get_attr(self._vocabulary, token)
            & self._library.LLAMA_TOKEN_ATTR_UNUSED
        ):
            return None
        text: bytes = self._library.llama_vocab_get_text(self._vocabulary, token)
        return text.decode("utf-8", "replace")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; the names of special tokens in the text become these tokens, as in transformers."""
        data = text.encode("utf-8")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(
            self._vocabulary, data, len(data), ids, room, add_special_tokens, True
        )
        if count < 0:
            raise InputError(
                f"llama.cpp cannot split a text of {len(data)} bytes into tokens.", hint="Shorten the text."
            )
        return list(ids[:count])

    def decode(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Text of the ids; incomplete characters become replacement characters."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 16
        for _ in range(2):
            text = ctypes.create_string_buffer(room)
            count = self._library.llama_detokenize(
                self._vocabulary,
                tokens,
                len(ids),
                text,
                room,
                skip_special_tokens,
                not skip_special_tokens,
            )
            if count >= 0:
                return text.raw[:count].decode("utf-8", "replace")
            room = -count
        raise InputError("llama.cpp cannot turn these tokens into text.", hint="Check the GGUF file.")

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = False,
    ) -> list[int]:
        """Ids of a conversation, rendered by the template as transformers renders one."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered = render_jinja_template(
            conversations=[[dict(message) for message in conversation]],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._text(self.bos_token_id),
            eos_token=self._text(self.eos_token_id),
        )
        return self.encode(next(iter(rendered[0])), add_special_tokens=False)

    def _id(self, function: object) -> int | None:
        assert callable(function)
        token = int(function(self._vocabulary))
        return token if token >= 0 else None

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.decode([token])


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """A file that llama.cpp opens: of a packed one, the standard header, and a hole where the weights are."""
    if not is_packed(path):
        check_gguf(path)
        yield path
        return
    view = standard_view(path)
    with tempfile.TemporaryDirectory(prefix="losa-gguf-") as name:
        file = Path(name) / path.name
        with file.open("wb") as out:
            out.write(view.header)
            out.truncate(view.total_bytes)
        yield file
