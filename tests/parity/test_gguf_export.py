"""Exported GGUF files against torch, in a stock llama-cpp-python."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from losa_deploy.benchmarks.report.assemble import dense_same_type_bytes
from losa_deploy.benchmarks.report.baseline import folder_bytes
from losa_deploy.errors import InputError, UsageError
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.gguf import view as gguf_view
from losa_deploy.gguf.view import find_gguf
from losa_deploy.layouts import VALUE_TYPES
from losa_deploy.lazy import Lazy
from losa_deploy.manifest import Manifest, hash_files
from losa_deploy.model import SparseModel
from losa_deploy.progress import no_progress
from losa_deploy.recipe import ExportRecipe, VerifyRecipe
from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime
from losa_deploy.verify.check import Parity, _check_weights, verify_export

from .conftest import GATED, Make, export_as

TOKENS = (5, 17, 200, 3, 44, 260, 8, 99)


def llama_logits(path: Path, tokens: list[int]) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] with an f32 cache and without flash attention."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_threads=1,
        logits_all=True,
        verbose=False,
        type_k=0,
        type_v=0,
        flash_attn=False,
    )
    model.eval(tokens)
    found: NDArray[np.float32] = model.scores[: len(tokens)].copy()
    model.close()
    return found


def torch_logits(model: SparseModel, weights: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Logits of the merged model with the given weights in the place of its own."""
    loaded = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    parameters = dict(loaded.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[f"{name}.weight"].copy_(torch.from_numpy(weight.copy()))
        result: NDArray[np.float32] = loaded(torch.tensor([list(TOKENS)])).logits[0].numpy()
    return result


def export(model: SparseModel, folder: Path, **recipe: object) -> Path:
    """The folder of an export, checked as `verify` does."""
    folder.mkdir()
    exporter = GgufExporter()
    export_as(exporter, model, ExportRecipe.model_validate(recipe), folder)
    reasons, _ = _check_weights(Manifest.read(folder), model, exporter.decode(folder))
    assert reasons == []
    return folder


@pytest.fixture(scope="session")
def merged_linear(make_merged: Make) -> SparseModel:
    """A Llama whose rotary embedding is scaled linearly."""
    from transformers import LlamaConfig

    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    return make_merged(LlamaConfig(**GATED, tie_word_embeddings=True, rope_parameters=scaling))


@pytest.fixture(scope="session")
def merged_smollm3(make_merged: Make) -> SparseModel:
    """Every fourth block without rotary embedding."""
    from transformers import SmolLM3Config

    return make_merged(SmolLM3Config(**{**GATED, "num_hidden_layers": 5, "pad_token_id": 1}))


FAMILIES = ("smollm3", "llama", "mistral", "qwen2", "qwen3", "biased", "yarn", "linear")


@pytest.mark.parametrize("family", FAMILIES)
def test_f32_equals_torch(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model: SparseModel = request.getfixturevalue(f"merged_{family}")
    folder = export(model, tmp_path / "out", value_type="f32")
    decoded = GgufExporter().decode(folder)
    assert all(np.array_equal(decoded[name], model.weight(name)) for name in model.linears)
    expected = torch_logits(model, {})
    found = llama_logits(find_gguf(folder), list(TOKENS))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("value_type", ["f16", "i8", "i4"])
def test_packed_and_portable_mean_the_decoded_weights(
    family: str, value_type: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model: SparseModel = request.getfixturevalue(f"merged_{family}")
    both = export(model, tmp_path / "both", value_type=value_type, packed=True, portable=True, group_size=32)
    packed, portable = find_gguf(both), next(p for p in both.glob("*.gguf") if "LOSA" not in p.name)
    assert packed != portable
    decoded = GgufExporter().decode(both)
    expected = torch_logits(model, decoded)
    plain = tmp_path / "plain.gguf"
    gguf_view.write_expanded(packed, plain)
    assert np.abs(llama_logits(plain, list(TOKENS)) - expected).max() <= 1e-5 * np.abs(expected).max()
    packed.unlink()  # then the portable file is the primary one
    again = GgufExporter().decode(both)
    whole_blocks = [name for name in decoded if decoded[name].shape[1] % 32 == 0]
    assert len(whole_blocks) > len(model.linears) / 2
    assert all(again[name].tobytes() == decoded[name].tobytes() for name in whole_blocks)
    rounded = llama_logits(portable, list(TOKENS))  # llama.cpp rounds activations to f16 or int8
    exact = torch_logits(model, again)
    assert np.abs(rounded - exact).max() <= 0.05 * np.abs(exact).max()
    reader = GGUFReader(portable)
    assert {t.tensor_type.name for t in reader.tensors if "attn_q.weight" in t.name} == {
        {"f16": "F16", "i8": "Q8_0", "i4": "Q4_0"}[value_type]
    }


def verified(folder: Path, model: SparseModel) -> Parity:
    """What `verify` says of an export of `model`."""
    recipe = VerifyRecipe(prompts=1, tokens=4, max_tokens=128, window=64)
    return verify_export(folder, model, GgufExporter(), LlamaCppRuntime(), recipe, threads=1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("value_type", "head"), [("i4", "same"), ("i4", "i4"), ("i8", "same")])
def test_each_of_two_files_is_judged_by_how_it_stores_its_weights(
    value_type: str, head: str, group_size: int, merged_qwen2: SparseModel, tmp_path: Path
) -> None:
    """Groups of Q4_0 have 32 positions whatever those of the packed file have; rows of 172 are F16."""
    folder = export(
        merged_qwen2,
        tmp_path / "both",
        packed=True,
        portable=True,
        value_type=value_type,
        head=head,
        group_size=group_size,
    )
    found = verified(folder, merged_qwen2)
    assert found.ok, found.reasons
    beside = GgufExporter().decode_beside(folder)
    assert beside is not None
    kinds = {(r.shape[1], r.value_type, r.group_size, r.layout) for r in beside.linears}
    whole = (64, value_type, 32 if value_type == "i4" else 0, "dense")
    assert kinds == {whole, (172, "f16", 0, "dense")}


def test_a_portable_code_one_level_off_is_found_beside_a_packed_file(
    merged_qwen2: SparseModel, tmp_path: Path
) -> None:
    """One that groups as wide as those of the packed file would excuse."""
    folder = export(merged_qwen2, tmp_path / "both", packed=True, portable=True, value_type="i4")
    (portable,) = (path for path in folder.glob("*.gguf") if path != find_gguf(folder))
    name = "model.layers.1.self_attn.v_proj"  # its rows stay in their order
    weight, mask = merged_qwen2.weight(name), merged_qwen2.mask(name)
    right, wide = VALUE_TYPES["i4"].error_bound(weight, 32), VALUE_TYPES["i4"].error_bound(weight, 128)
    row, column = _one_level_off(portable, weight, mask, right, wide)
    document = Manifest.read(folder)
    document.model_copy(update={"files": hash_files(folder)}).write(folder)
    found = verified(folder, merged_qwen2)
    assert not found.ok and len(found.reasons) == 1
    assert found.reasons[0].startswith(
        f"portable file: {name}: found 1 weights further off than i4 rounds (first at [{row}, {column}]: "
    )


def _one_level_off(
    path: Path,
    weight: NDArray[np.float32],
    mask: NDArray[np.bool_],
    right: NDArray[np.float32],
    wide: NDArray[np.float32],
) -> tuple[int, int]:
    """Change one code of blk.1.attn_v.weight so that its error lies between two bounds; where it is."""
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.attn_v.weight")
    blocks = np.array(tensor.data).reshape(weight.shape[0], -1, 18)
    for row, column in np.argwhere(mask):
        block, at = column // 32, column % 32
        scale = float(blocks[row, block, :2].copy().view("<f2")[0])
        byte, shift = 2 + at % 16, at // 16 * 4
        code = int(blocks[row, block, byte]) >> shift & 15
        for other in (code - 1, code + 1):
            error = abs((other - 8) * scale - float(weight[row, column]))
            if 0 <= other < 16 and 1.01 * right[row, column] < error < wide[row, column]:
                offset = int(tensor.data_offset) + (row * blocks.shape[1] + block) * 18 + byte
                data = bytearray(path.read_bytes())
                data[offset] = data[offset] & ~(15 << shift) | other << shift
                path.write_bytes(data)
                return int(row), int(column)
    raise AssertionError("no code has an error between the bounds when it changes")


def field(path: Path, key: str) -> object:
    found = GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


def test_keys_of_both_kinds(merged_qwen3: SparseModel, tmp_path: Path) -> None:
    folder = export(merged_qwen3, tmp_path / "both", value_type="i8", packed=True, portable=True)
    names = sorted(path.name for path in folder.glob("*.gguf"))
    assert names == ["random-135K-LOSA-I8.gguf", "random-135K-Q8_0.gguf"]
    common = {
        "general.type": "model",
        "general.name": "random",
        "general.basename": "random",
        "general.size_label": "135K",
        "general.quantized_by": "losa-deploy 0.1.0",
        "general.file_type": 7,
        "qwen3.block_count": 2,
        "qwen3.context_length": 128,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 172,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.dimension_count": 32,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "losa.source": "test/random",
        "losa.revision": "0123abc",
        "losa.sparsity": 0.5,
        "losa.value_type": "i8",
        "losa.schema": "losa.manifest/1",
        "losa.tool_version": "0.1.0",
    }
    packed, portable = (folder / name for name in names)
    for path in (packed, portable):
        assert {key: field(path, key) for key in common} == common
    assert field(portable, "general.architecture") == "qwen3"
    assert field(portable, "losa.required") is None and field(portable, "general.alignment") is None
    own = ("general.architecture", "losa.architecture", "losa.required", "losa.format", "general.alignment")
    assert [field(packed, key) for key in own] == ["losa-packed", "qwen3", True, 1, 64]
    chat = field(packed, "tokenizer.chat_template")
    assert isinstance(chat, str) and chat.startswith("{% for m in messages %}")
    tensors = {t.name: t.tensor_type.name for t in GGUFReader(packed).tensors}
    assert tensors["losa.blk.1.ffn_gate.weight"] == "I8" and "blk.1.ffn_gate.weight" not in tensors
    assert tensors["token_embd.weight"] == "Q8_0" and "output.weight" not in tensors
    assert tensors["blk.0.attn_q_norm.weight"] == tensors["output_norm.weight"] == "F32"
    assert {t.data_offset % 64 for t in GGUFReader(packed).tensors} == {0}


def test_bytes_of_a_portable_row(merged_qwen2: SparseModel, tmp_path: Path) -> None:
    """Worked out by hand from the weights: one scale per row, then levels; nibbles of Q4_0."""
    weight = merged_qwen2.weight("model.layers.1.self_attn.v_proj")
    assert merged_qwen2.linears["model.layers.1.self_attn.v_proj"] == (64, 64)
    i8 = find_gguf(export(merged_qwen2, tmp_path / "i8", value_type="i8"))
    row = next(t for t in GGUFReader(i8).tensors if t.name == "blk.1.attn_v.weight").data[3]
    scale = np.float16(np.abs(weight[3]).max() / np.float32(127))
    levels = np.rint(weight[3] / np.float32(scale)).clip(-127, 127).astype(np.int8)
    expected = scale.tobytes() + levels[:32].tobytes() + scale.tobytes() + levels[32:].tobytes()
    assert row.tobytes() == expected
    i4 = find_gguf(export(merged_qwen2, tmp_path / "i4", value_type="i4"))
    row = next(t for t in GGUFReader(i4).tensors if t.name == "blk.1.attn_v.weight").data[3]
    expected = b""
    for group in (weight[3, :32], weight[3, 32:]):
        scale = np.float16(group[np.abs(group).argmax()] / np.float32(-8))
        codes = (np.rint(group / np.float32(scale)).clip(-8, 7) + 8).astype(np.uint8)
        expected += scale.tobytes() + (codes[:16] | codes[16:] << 4).tobytes()
    assert row.tobytes() == expected


def test_rows_of_q_and_k_are_interleaved_for_llama_only(
    merged_llama: SparseModel, merged_qwen3: SparseModel, tmp_path: Path
) -> None:
    folder = find_gguf(export(merged_llama, tmp_path / "llama", value_type="f32"))
    stored = {t.name: t.data for t in GGUFReader(folder).tensors}
    query = merged_llama.weight("model.layers.0.self_attn.q_proj")  # heads of 16 rows
    assert np.array_equal(stored["blk.0.attn_q.weight"][:4], query[[0, 8, 1, 9]])
    assert np.array_equal(stored["blk.0.attn_q.weight"][16:18], query[[16, 24]])
    assert np.array_equal(
        stored["blk.0.attn_v.weight"], merged_llama.weight("model.layers.0.self_attn.v_proj")
    )
    folder = find_gguf(export(merged_qwen3, tmp_path / "qwen3", value_type="f32"))
    stored = {t.name: t.data for t in GGUFReader(folder).tensors}
    assert np.array_equal(
        stored["blk.0.attn_q.weight"], merged_qwen3.weight("model.layers.0.self_attn.q_proj")
    )


def test_a_packed_file_is_refused_by_stock_llama_cpp_with_its_name(
    merged_llama: SparseModel, tmp_path: Path
) -> None:
    folder = export(merged_llama, tmp_path / "packed", value_type="i4", packed=True)
    (path,) = folder.glob("*.gguf")
    # In a process of its own: ours have silenced llama.cpp's log in this one.
    code = "import sys, llama_cpp; llama_cpp.Llama(sys.argv[1], verbose=True)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "ValueError: Failed to load" in done.stderr
    assert "unknown model architecture: 'losa-packed'" in done.stderr


def test_the_plan_is_what_is_written(merged_llama: SparseModel, tmp_path: Path) -> None:
    recipe = {"value_type": "i4", "packed": True, "portable": True}
    planned = GgufExporter().plan(merged_llama, ExportRecipe.model_validate(recipe))
    manifest = Manifest.read(folder := export(merged_llama, tmp_path / "out", **recipe))
    written = {record.name: record for record in (*manifest.linears, *manifest.other_tensors)}
    assert {t.name: (t.layout, t.bytes, t.nnz, t.reason) for t in planned.tensors} == {
        name: (r.layout, r.bytes, r.nnz, r.reason) for name, r in written.items()
    }
    for name, size in planned.files.items():
        assert abs(size - (folder / name).stat().st_size) < 200_000
    assert "no smaller than an unpruned one" not in "".join(r.reason for r in manifest.linears)
    alone = Manifest.read(export(merged_llama, tmp_path / "portable", value_type="i4"))
    assert all("no smaller than an unpruned one" in record.reason for record in alone.linears)


def test_sizes_in_a_report_are_of_the_file_that_is_opened(merged_llama: SparseModel, tmp_path: Path) -> None:
    folder = export(merged_llama, tmp_path / "both", value_type="i8", packed=True, portable=True)
    manifest = Manifest.read(folder)
    packed, portable = find_gguf(folder), next(p for p in folder.glob("*.gguf") if "LOSA" not in p.name)
    side = sum(p.stat().st_size for p in folder.iterdir() if p.suffix != ".gguf" and p.name in manifest.files)
    assert folder_bytes(folder, manifest) == packed.stat().st_size + side
    same = dense_same_type_bytes(folder_bytes(folder, manifest), manifest, GgufExporter())
    assert abs(same - portable.stat().st_size - side) < 256 * len(manifest.linears)  # headers of the blobs
    alone = export(merged_llama, tmp_path / "alone", value_type="i8")
    size = folder_bytes(alone, Manifest.read(alone))
    assert dense_same_type_bytes(size, Manifest.read(alone), GgufExporter()) == size


def test_same_input_same_bytes(merged_llama: SparseModel, tmp_path: Path) -> None:
    one = export(merged_llama, tmp_path / "one", packed=True, portable=True)
    two = export(merged_llama, tmp_path / "two", packed=True, portable=True)
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


@pytest.mark.parametrize("layout", ["dense", "bitmask", "nm"])
def test_a_forced_layout_is_packed_as_such(make_merged: Make, layout: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    model = make_merged(LlamaConfig(**{**GATED, "intermediate_size": 192}, tie_word_embeddings=True))
    if layout == "nm":
        with pytest.raises(UsageError, match="keeps no fixed N of every M"):
            export(model, tmp_path / "nm", layout="nm", packed=True)
        return
    folder = export(model, tmp_path / "out", layout=layout, packed=True, value_type="i8")
    assert {record.layout for record in Manifest.read(folder).linears} == {layout}
    view = gguf_view.standard_view(find_gguf(folder))
    assert view.total_bytes > 0


def test_the_dense_baseline_is_f16_or_f32(merged_llama: SparseModel, tmp_path: Path) -> None:
    exporter = GgufExporter()
    for value_type, kind in (("i8", "F16"), ("f32", "F32")):
        exported = export(merged_llama, tmp_path / value_type, value_type=value_type, packed=True)
        folder = tmp_path / f"dense-{value_type}"
        folder.mkdir()
        dense = exporter.export_dense(merged_llama.checkpoint, exported, folder, no_progress)
        assert {record.layout for record in dense.tensors} == {"dense"}
        (path,) = folder.glob(f"*-{kind}.gguf")
        found, expected = llama_logits(path, list(TOKENS)), torch_logits(merged_llama, {})
        tolerance = 1e-5 if kind == "F32" else 5e-3
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_a_part_of_the_decoded_weights_outlives_the_whole(merged_llama: SparseModel, tmp_path: Path) -> None:
    decoded = GgufExporter().decode(export(merged_llama, tmp_path / "out", packed=True))
    assert isinstance(decoded, Lazy)
    name = "model.layers.0.mlp.up_proj"
    expected, part = decoded[name], decoded.renamed({name: "other"})
    del decoded
    gc.collect()
    assert list(part) == ["other"] and np.array_equal(part["other"], expected)


def test_decode_of_a_damaged_folder(merged_llama: SparseModel, tmp_path: Path) -> None:
    folder = export(merged_llama, tmp_path / "out", packed=True)
    path = find_gguf(folder)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match="no sound GGUF"):
        GgufExporter().decode(folder)
    path.write_bytes(good.replace(b"losa.blk.1.ffn_up.weight", b"losa.blk.1.ffn_um.weight"))
    with pytest.raises(InputError, match=r"does not hold model.layers.1.mlp.up_proj"):
        GgufExporter().decode(folder)
    path.write_bytes(good)
    (folder / "copy.gguf").write_bytes(good)
    with pytest.raises(InputError, match=r"found copy.gguf, random-"):
        GgufExporter().decode(folder)
    for file in folder.glob("*.gguf"):
        file.unlink()
    with pytest.raises(InputError, match="found none"):
        GgufExporter().decode(folder)
