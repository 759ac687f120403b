"""Tokenizer wrapper and incremental decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from losa_deploy.errors import InputError
from losa_deploy.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

HARD_TEXT = "é 日本語 👩‍👩‍👧 naïve  spaces\n\tend ✓"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(tiny_llama)


def copy_without(source: Path, target: Path, *names: str) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", *names))
    return target


def test_round_trip(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(HARD_TEXT)
    assert tokenizer.decode(ids) == HARD_TEXT
    assert max(ids) < tokenizer.size == 300


def test_streamed_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(HARD_TEXT)
    assert len(ids) > len(HARD_TEXT)  # most characters need several ids, so there is something to hold back
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(i) for i in ids]
    assert "".join(pieces) == HARD_TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert decoder.flush() == ""


def test_an_unfinished_character_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a語")[:-1]
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.feed(i) for i in ids) == "a"
    assert set(decoder.flush()) == {"\N{REPLACEMENT CHARACTER}"}


def test_broken_bytes_do_not_stop_the_stream(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("語")[:1], *tokenizer.encode("abc")]
    text = StreamDecoder(tokenizer).decode_all(ids)
    assert text.endswith("abc") and text != "abc"


def test_a_leading_space_survives_between_pieces(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" one two")
    assert StreamDecoder(tokenizer).decode_all(ids) == " one two"


def test_special_tokens_are_silent(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("ab"), tokenizer.eos_ids[0], *tokenizer.encode("cd")]
    assert StreamDecoder(tokenizer).decode_all(ids) == "abcd"
    assert "<|end|>" in tokenizer.decode(ids, special=True)


def test_chat_ends_where_the_reply_starts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, special=True) == "<|system|>S<|end|><|user|>hi<|end|><|assistant|>"


def test_no_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "copy", "chat_template.jinja")
    tokenizer = load_tokenizer(folder)
    assert not tokenizer.has_chat_template
    with pytest.raises(InputError, match="losa-deploy generate"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_a_template_may_refuse(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system message') }}")
    with pytest.raises(InputError, match=r"\(system\): no system message"):
        load_tokenizer(folder).chat([{"role": "system", "content": "hi"}])


def test_all_end_tokens_are_found(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 9, "model_type": "llama"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (7, 9, 1)
    assert tokenizer.separator_id == 1
    assert tokenizer.bos_id == 0


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "copy")
    data = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(folder)


def test_a_folder_with_only_a_sentencepiece_model(tmp_path: Path) -> None:
    """As Llama 2 and Vicuna are published: ids are those of the library that made the model."""
    lines = [f"a small boat number {i} went over the sea to {i * 7} islands" for i in range(200)]
    (tmp_path / "text").write_text("\n".join(lines))
    SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    names = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**names, "add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    maker = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("a boat went over the sea", "7 islands", "na\u00efve \U0001f6f6"):
        ids = tokenizer.encode(text)
        assert ids == [tokenizer.bos_id, *maker.encode(text)]
        assert tokenizer.decode(ids) == text
