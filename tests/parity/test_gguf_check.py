"""Numbers that llama.cpp would end the process over are refused, and sound files of any kind are not."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter

from losa_deploy.errors import InputError
from losa_deploy.exporters.gguf.architectures import ARCHITECTURES
from losa_deploy.exporters.gguf.architectures.refusals import refuse_partial_rotation
from losa_deploy.exporters.gguf.exporter import GgufExporter
from losa_deploy.gguf.check import check_gguf, whole_heads
from losa_deploy.gguf.file import SCALARS, open_header
from losa_deploy.gguf.view import is_packed, standard_view, write_expanded
from losa_deploy.model import SparseModel
from losa_deploy.recipe import ExportRecipe
from losa_deploy.sources.locate import default_model

from .conftest import export_as

NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture(scope="module")
def files(merged_llama: SparseModel, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """`packed` and `portable`: both files of an export."""
    folder = tmp_path_factory.mktemp("both")
    recipe = ExportRecipe(value_type="i8", packed=True, portable=True)
    export_as(GgufExporter(), merged_llama, recipe, folder)
    return {"packed" if is_packed(path) else "portable": path for path in folder.glob("*.gguf")}


def patched(source: Path, folder: Path, key: str, number: float) -> Path:
    """A copy with another number in one key."""
    data = bytearray(source.read_bytes())
    with open_header(source) as header:
        value = header.keys[key]
    kind = SCALARS[value.type]
    struct.pack_into("<" + kind, data, value.start, number if kind == "f" else int(number))
    target = folder / "model.gguf"
    target.write_bytes(data)
    return target


CASES = [
    ("llama.block_count", 1000, "a whole number from 1 to 512"),
    ("llama.block_count", 0, "a whole number from 1 to 512"),
    ("llama.block_count", 3, "2, of which there are tensors (blk.0 to blk.1)"),
    ("llama.block_count", 1, "2, of which there are tensors"),
    ("llama.attention.layer_norm_rms_epsilon", NAN, "a finite number"),
    ("llama.attention.layer_norm_rms_epsilon", -1e-5, "a number above 0"),
    ("llama.attention.layer_norm_rms_epsilon", 0, "a number above 0"),
    ("llama.rope.freq_base", INFINITE, "a finite number"),
    ("llama.rope.freq_base", -1, "a number above 0"),
    ("llama.rope.dimension_count", 8, "16, the length of a head"),
    ("llama.attention.head_count", 0, "a whole number from 1"),
    ("llama.attention.head_count", 3, "a divisor of embedding_length, 64"),
    ("llama.attention.head_count_kv", 0, "a whole number from 1"),
    ("llama.attention.head_count_kv", 3, "a divisor of head_count, 4"),
    ("llama.context_length", 0, "a whole number from 1 to 2147483647"),
    ("llama.context_length", 2**32 - 1, "a whole number from 1 to 2147483647"),
    ("llama.embedding_length", 128, "64 as in token_embd.weight [300, 64]"),
    ("llama.vocab_size", 299, "300 as in token_embd.weight [300, 64]"),
]


@pytest.mark.parametrize("kind", ["packed", "portable"])
@pytest.mark.parametrize(("key", "number", "expected"), CASES)
def test_a_number_that_no_model_has_is_refused(
    files: Mapping[str, Path], tmp_path: Path, kind: str, key: str, number: float, expected: str
) -> None:
    path = patched(files[kind], tmp_path, key, number)
    check: Callable[[Path], object] = standard_view if kind == "packed" else check_gguf
    with pytest.raises(InputError) as caught:
        check(path)
    assert f"{path} cannot be run: its {key} is " in str(caught.value)
    assert f", expected {expected}" in str(caught.value)
    with pytest.raises(InputError, match=key):
        write_expanded(path, tmp_path / "plain.gguf")


@pytest.mark.parametrize(
    ("kind", "key", "number"),
    [
        ("packed", "llama.attention.layer_norm_rms_epsilon", NAN),
        ("portable", "llama.attention.layer_norm_rms_epsilon", NAN),
        ("portable", "llama.block_count", 1000),
    ],
)
def test_the_command_ends_with_code_3_and_one_line(
    files: Mapping[str, Path], tmp_path: Path, kind: str, key: str, number: float
) -> None:
    """In a process of its own, because llama.cpp would end it."""
    code = "import sys; from losa_deploy.cli.main import main; sys.exit(main(sys.argv[1:]))"
    path = patched(files[kind], tmp_path, key, number)
    command = [sys.executable, "-c", code, "generate", "-m", str(path), "Anna", "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    assert len(done.stderr.splitlines()) == 1 and f"its {key} is " in done.stderr


def test_files_of_an_export_and_one_from_elsewhere_are_sound(files: Mapping[str, Path]) -> None:
    check_gguf(files["portable"])
    standard_view(files["packed"])
    check_gguf(default_model())  # with tensors of a type that we do not write


Write = Callable[[GGUFWriter], None]


def header_of(path: Path, architecture: str, write: Write, tensors: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of any architecture: some keys, and tensors [out, in] of zeros."""
    writer = GGUFWriter(path, architecture)
    write(writer)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _no_attention(writer: GGUFWriter) -> None:
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)


def _per_block(writer: GGUFWriter) -> None:
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_head_count([4, 0])
    writer.add_head_count_kv([2, 0])
    writer.add_key_length(8)
    writer.add_rope_dimension_count(4)
    writer.add_rope_scaling_factor(0.0)


def _experts(writer: GGUFWriter) -> None:
    writer.add_block_count(3)
    writer.add_nextn_predict_layers(1)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)


def _part(writer: GGUFWriter) -> None:
    writer.add_block_count(40)
    writer.add_uint16("split.count", 3)


@pytest.mark.parametrize(
    ("architecture", "write", "tensors"),
    [
        ("mamba", _no_attention, ("blk.0.ssm_in.weight", "blk.1.ssm_in.weight")),
        ("deci", _per_block, ("blk.0.attn_q.weight", "blk.1.ffn_up.weight")),
        ("glm4moe", _experts, ("blk.0.attn_q.weight", "blk.1.attn_q.weight")),
        ("llama", _part, ("blk.0.attn_q.weight",)),
        ("clip", lambda writer: None, ("v.blk.0.attn_q.weight",)),
    ],
    ids=["no attention", "a number for each block", "experts", "first of three files", "no language model"],
)
def test_what_a_file_does_not_say_is_not_asked_for(
    tmp_path: Path, architecture: str, write: Write, tensors: tuple[str, ...]
) -> None:
    shapes = dict.fromkeys(tensors, (32, 32)) | {"token_embd.weight": (10, 32)}
    check_gguf(header_of(tmp_path / "model.gguf", architecture, write, shapes))


@pytest.mark.parametrize(
    ("key", "number", "expected"),
    [
        ("rope.scaling.factor", -2.0, "a number of at least 0"),
        ("rope.scaling.factor", NAN, "a finite number"),
        ("attention.layer_norm_epsilon", NAN, "a finite number"),
        ("rope.freq_base", 0.0, "a number above 0"),
        ("rope.dimension_count", 64, "an even number up to 8"),
        ("rope.dimension_count", 3, "an even number up to 8"),
        ("attention.value_length", 0, "a whole number from 1"),
        ("attention.key_length", 2**31, "a whole number from 1"),
        ("expert_used_count", 0, "from 1 to expert_count, 8"),
        ("expert_used_count", 9, "from 1 to expert_count, 8"),
        ("block_count", 2.5, "a whole number"),
        ("vocab_size", 2**31, "a whole number"),
    ],
)
def test_keys_that_our_files_do_not_have_are_judged_too(
    tmp_path: Path, key: str, number: float, expected: str
) -> None:
    def write(writer: GGUFWriter) -> None:
        sound: dict[str, float] = {
            "embedding_length": 32,
            "attention.head_count": 4,
            "expert_count": 8,
            "expert_used_count": 2,
        }
        for name, value in {**sound, key: number}.items():
            kind = GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.UINT32
            writer.add_key_value(f"qwen2moe.{name}", value, kind)

    path = header_of(tmp_path / "model.gguf", "qwen2moe", write, {"blk.0.attn_q.weight": (32, 32)})
    with pytest.raises(InputError, match=rf"its qwen2moe\.{key} is .*, expected {expected}"):
        check_gguf(path)


def test_llama_cpp_finds_a_score_for_each_token(tmp_path: Path) -> None:
    """It reads as many as there are tokens, beyond the end of a shorter list."""

    def write(writer: GGUFWriter) -> None:
        writer.add_token_list(["a", "b", "c"])
        writer.add_token_scores([0.0, 1.0])

    path = header_of(tmp_path / "model.gguf", "llama", write, {"token_embd.weight": (3, 32)})
    with pytest.raises(InputError, match=r"tokenizer.ggml.scores is a list of 2, expected 3, one for each"):
        check_gguf(path)


def test_files_are_asked_for_whole_heads_where_the_exporter_is() -> None:
    """Of what we write, the list for all files names what a partial rotation is refused for."""
    refused = {kind.name: refuse_partial_rotation in kind.refusals for kind in ARCHITECTURES.values()}
    assert set(refused) & whole_heads() == {name for name, whole in refused.items() if whole}
