"""Tokens of llama.cpp against those of transformers, for tokenizers of both kinds."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from losa_deploy.errors import InputError
from losa_deploy.exporters.gguf.tokenizer import read_vocabulary
from losa_deploy.exporters.gguf.vocabulary import Vocabulary
from losa_deploy.text.gguf import GgufVocabulary
from losa_deploy.text.tokenizer import load_tokenizer

TEXTS = (
    "Hello, world!",
    "  leading and   inner spaces and trailing  ",
    "tabs\tand\nnew\n\n\nlines\r\nof Windows \n ",
    "numbers 1 22 333 4444 55555, 3.14159 and 1,000,000; a1b22c333",
    "don't we'll I'VE you're he'd it's I'm",
    "ünïcödé ß ÆØÅ Ελληνικά русский עברית العربية हिन्दी ไทย 日本語 中文字 한국어",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and \u200bzero\u00a0width",
    "def f(x):\n    return x**2  # comment\n\tif x<=3: pass",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] a </s> b",
    "http://example.com/a?b=c&d=%20e#f @user #tag $5 €6 50%",
    "CamelCase snake_case UPPERCASE MiXeD",
    "e\u0301 combining",
    "a",
    " ",
    "",
)


def vocabulary_file(vocabulary: Vocabulary, path: Path) -> Path:
    """A GGUF with a tokenizer and no tensors."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary.tokens))
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_tokens(folder: Path, vocabulary: Vocabulary, path: Path, texts: tuple[str, ...] = TEXTS) -> None:
    """Equal tokens for every text, special tokens in it included, and the same text back."""
    import llama_cpp

    model = llama_cpp.Llama(str(vocabulary_file(vocabulary, path)), vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(folder)
    for text in texts:
        expected = tokenizer.encode(text)
        found = model.tokenize(text.encode(), add_bos=True, special=True)
        assert found == expected, text
    model.close()


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer trained on the texts, with special and other added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*TEXTS, *TEXTS], trainer)
    inner.add_tokens([AddedToken("<note>", normalized=False)])
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template="{{ messages }}",
    ).save_pretrained(str(folder))
    return folder


def with_rules(source: Path, folder: Path, name: str) -> Path:
    from losa_deploy.text.pretokenizers import rules

    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text("utf-8"))
    document["pre_tokenizer"] = rules(name)
    document["model"]["ignore_merges"] = name in ("llama-bpe", "tekken")
    path.write_text(json.dumps(document), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken"])
def test_rules_are_recognised_and_split_alike(name: str, bpe_folder: Path, tmp_path: Path) -> None:
    folder = with_rules(bpe_folder, tmp_path / "rules", name)
    vocabulary = read_vocabulary(folder, 640, {})
    assert (vocabulary.model, vocabulary.pre, vocabulary.notes) == ("gpt2", name, ())
    assert vocabulary.tokens[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert vocabulary.types[:4] == (3, 3, 3, 1)
    assert vocabulary.types[vocabulary.tokens.index("<note>")] == 4
    assert vocabulary.tokens[639] == "[PAD639]" and vocabulary.types[639] == 5
    assert vocabulary.ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert vocabulary.flags == {"add_bos_token": False, "add_eos_token": False}
    assert vocabulary.template == "{{ messages }}"
    check_tokens(folder, vocabulary, tmp_path / "vocabulary.gguf", (*TEXTS, "a <note> b"))


def test_names_of_padding_are_none_that_a_token_has(bpe_folder: Path, tmp_path: Path) -> None:
    """llama.cpp ends the process over a vocabulary that has a token twice."""
    folder = tmp_path / "padded"
    shutil.copytree(bpe_folder, folder)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    last = max(token["id"] for token in document["added_tokens"])
    like = document["added_tokens"][-1]
    # An id without a token, whose name is a later token's; and the name of an id beyond all of these.
    for index, name in ((last + 2, f"[PAD{last + 1}]"), (last + 3, f"[PAD{last + 4}]")):
        document["added_tokens"].append({**like, "id": index, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    vocabulary = read_vocabulary(folder, last + 8, {})
    assert vocabulary.tokens[last + 1 : last + 6] == (
        f"[[PAD{last + 1}]]",
        f"[PAD{last + 1}]",
        f"[PAD{last + 4}]",
        f"[[PAD{last + 4}]]",
        f"[PAD{last + 5}]",
    )
    assert vocabulary.types[last + 1 : last + 6] == (5, 4, 4, 5, 5)
    assert len(set(vocabulary.tokens)) == len(vocabulary.tokens) == last + 8
    opened = GgufVocabulary(vocabulary_file(vocabulary, tmp_path / "vocabulary.gguf"))
    assert len(opened) == last + 8
    assert opened.encode(f"[PAD{last + 4}]", add_special_tokens=False) == [last + 3]


def test_unknown_rules_are_noted(bpe_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(bpe_folder, folder)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    vocabulary = read_vocabulary(folder, 640, {})
    assert vocabulary.pre == "default" and "none that llama.cpp has" in vocabulary.notes[0]


def test_more_tokens_than_rows_are_refused(bpe_folder: Path) -> None:
    with pytest.raises(InputError, match=r"has \d{3} tokens, the model's embedding 300 rows"):
        read_vocabulary(bpe_folder, 300, {})


def test_ends_of_a_reply_come_from_the_generation_config(bpe_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ends"
    shutil.copytree(bpe_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert read_vocabulary(folder, 640, {}).ids == {"bos": 1, "eos": 2, "unknown": 0, "eot": 0}


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece-like tokenizer.json as Llama 2 has one: BPE on ▁ words with bytes as a last resort."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=start, show_progress=False, limit_alphabet=90, max_token_length=12
    )
    trained.train_from_iterator([word for text in TEXTS for word in text.split()] * 3, trainer)
    document = json.loads(trained.to_str())
    document["added_tokens"] = document["added_tokens"][:3]
    inner = Tokenizer.from_str(json.dumps(document))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    folder = tmp_path_factory.mktemp("llama")
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder


def test_a_llama_tokenizer_json_becomes_sentencepiece(llama_folder: Path, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(llama_folder, 520, {})
    assert vocabulary.model == "llama" and vocabulary.types[:4] == (2, 3, 3, 6)
    assert vocabulary.ids == {"bos": 1, "eos": 2, "unknown": 0}
    assert vocabulary.flags == {"add_space_prefix": True, "add_bos_token": True, "add_eos_token": False}
    merged = [i for i, score in enumerate(vocabulary.scores) if score > min(vocabulary.scores)]
    assert merged and vocabulary.scores[merged[0]] == 0.0 and vocabulary.types[merged[0]] == 1
    check_tokens(llama_folder, vocabulary, tmp_path / "vocabulary.gguf", TEXTS[:-2])


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def record(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece_model(
    vocabulary: Vocabulary, *, model_type: int = 2, prefix: bool = True, rules: str = "identity"
) -> bytes:
    """A `tokenizer.model` of these tokens."""
    pieces = b""
    for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True):
        inner = record(1, token.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        pieces += record(1, inner + (varint(3 << 3) + varint(kind) if kind != 1 else b""))
    trainer = record(2, varint(3 << 3) + varint(model_type))
    normalizer = record(3, record(1, rules.encode()) + bytes([3 << 3, prefix, 4 << 3, 0]))
    return pieces + trainer + normalizer


def test_a_tokenizer_model_gives_its_own_scores(llama_folder: Path, tmp_path: Path) -> None:
    expected = read_vocabulary(llama_folder, 520, {})
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(expected))
    assert read_vocabulary(folder, 520, {}) == expected
    (folder / "tokenizer.json").unlink()  # then there is nothing else, as Llama 2 was published
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 521}))
    alone = read_vocabulary(folder, 530, {"bos_token_id": 1, "eos_token_id": 2})
    assert alone.tokens[:520] == expected.tokens and alone.scores[:520] == expected.scores
    assert (alone.tokens[521], alone.types[521], alone.types[520]) == ("<extra>", 4, 5)
    assert alone.ids["bos"] == 1 and alone.ids["eos"] == 2
    assert alone.flags["add_bos_token"] and not alone.flags["add_eos_token"]
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(expected, prefix=False))
    assert read_vocabulary(folder, 530, {}).flags["add_space_prefix"] is False
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(expected, rules="nmt_nfkc"))
    assert "'nmt_nfkc'" in read_vocabulary(folder, 530, {}).notes[0]
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD520]": 521}))
    assert read_vocabulary(folder, 523, {}).tokens[520:] == ("[[PAD520]]", "[PAD520]", "[PAD522]")


def test_a_prefix_that_is_not_always_put_is_noted(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "first"
    shutil.copytree(llama_folder, folder)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["normalizer"] = None
    document["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    vocabulary = read_vocabulary(folder, 520, {})
    assert vocabulary.flags["add_space_prefix"] is True and "after a special token" in vocabulary.notes[0]
    plain = tuple(text for text in TEXTS[:8] if not text.startswith(" "))
    check_tokens(folder, vocabulary, tmp_path / "vocabulary.gguf", plain)
    document["pre_tokenizer"]["prepend_scheme"] = "never"
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    vocabulary = read_vocabulary(folder, 520, {})
    assert vocabulary.flags["add_space_prefix"] is False and vocabulary.notes == ()
    check_tokens(folder, vocabulary, tmp_path / "vocabulary.gguf", TEXTS[:8])


def test_damaged_or_foreign_tokenizers_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(llama_folder, 520, {})
    good = sentencepiece_model(vocabulary)
    path = tmp_path / "tokenizer.model"
    for bad in (good[:-3], good[:50], b"\x0b", b"\xff" * 20):
        path.write_bytes(bad)
        with pytest.raises(InputError, match="SentencePiece"):
            read_vocabulary(tmp_path, 520, {})
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no pieces"):
        read_vocabulary(tmp_path, 520, {})
    path.write_bytes(sentencepiece_model(vocabulary, model_type=1))
    with pytest.raises(InputError, match="no BPE model"):
        read_vocabulary(tmp_path, 520, {})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(InputError, match="'Unigram'"):
        read_vocabulary(tmp_path, 520, {})


@pytest.mark.slow
def test_tokens_of_the_embedded_model(tmp_path: Path) -> None:
    """From its own GGUF through transformers and back: the rules that split text survive."""
    from losa_deploy.progress import no_progress
    from losa_deploy.sources.checkpoint import Checkpoint
    from losa_deploy.sources.gguf import convert_gguf
    from losa_deploy.sources.locate import DEFAULT_ID, default_model

    source: Checkpoint = convert_gguf(
        default_model(), DEFAULT_ID, tmp_path / "source", no_progress, pytest.fail
    )[0]
    vocabulary = read_vocabulary(source.folder, 49152, source.config)
    assert (vocabulary.model, vocabulary.pre, vocabulary.notes) == ("gpt2", "smollm", ())
    assert vocabulary.ids == {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
    assert vocabulary.types[:18] == (3,) * 17 + (1,)
    assert vocabulary.template.startswith("{% for message in messages %}")
    check_tokens(source.folder, vocabulary, tmp_path / "vocabulary.gguf")
