"""Mask patterns through the command line: compress, merge, verify and export on the tiny model."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from losa_deploy.cli.main import main
from losa_deploy.manifest import hash_files
from losa_deploy.model import MASK_FILE, SparseModel, pack_mask

SMALL = ["--samples", "8", "--sequence-length", "32", "--steps", "2", "--adapt-steps", "2", "--threads", "1"]


def losa(*argv: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("flags", "sparsity", "layout"),
    [
        (["--pattern", "sliding", "--prune-method", "wanda"], 0.5, "sliding"),
        (["--pattern", "sliding:2.5", "--adapt", "none"], 0.6, "bitmask"),
        (["--pattern", "pair", "--bits", "2.75", "--set", "export.value_type=i4"], 0.46875, "bitmask"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_pattern_holds_from_compress_to_the_exported_model(
    tiny_llama: Path, tmp_path: Path, flags: list[str], sparsity: float, layout: str
) -> None:
    adapted, merged, onnx = (tmp_path / name for name in ("adapted", "merged", "onnx"))
    code, _, err = losa("compress", "-m", tiny_llama, "-o", adapted, *SMALL, *flags, "--offline")
    assert code == 0, err
    code, _, err = losa("merge", adapted, "-m", tiny_llama, "-o", merged, "--offline")
    assert code == 0, err
    code, _, err = losa("verify", merged)
    assert code == 0, err
    model = SparseModel.open(merged)
    assert model.manifest.sparsity_achieved == pytest.approx(sparsity, abs=0.01)
    code, _, err = losa("export", merged, "-f", "onnx", "-o", onnx, "--verify", "off", "--threads", "1")
    assert code == 0, err
    stored = json.loads((onnx / "losa.json").read_text())["linears"]
    assert {t["layout"] for t in stored} == {layout}
    assert all(("pairs of rows" in t["reason"]) == ("pair" in flags) for t in stored)

    damage(merged, model)
    code, out, err = losa("verify", merged)
    assert code == 6
    assert "without a slot" in out + err or "two masks" in out + err


def compressed_and_merged(model: Path, folder: Path, flags: list[str]) -> Path:
    """The merged folder of a model compressed with these flags."""
    adapted, merged = folder / "adapted", folder / "merged"
    code, _, err = losa("compress", "-m", model, "-o", adapted, *SMALL, *flags)
    assert code == 0, err
    code, _, err = losa("merge", adapted, "-m", model, "-o", merged, "--offline")
    assert code == 0, err
    return merged


def test_sliding_windows_reach_both_runtimes(tiny_llama: Path, tmp_path: Path) -> None:
    """Compressed, exported as ONNX and as packed GGUF, and verified there: logits of our kernels."""
    flags = ["--pattern", "sliding", "--set", "export.value_type=i4", "--offline"]
    merged = compressed_and_merged(tiny_llama, tmp_path, flags)
    for name, more in (("onnx", []), ("gguf", ["--packed"])):
        folder = tmp_path / name
        code, _, err = losa("export", merged, "-f", name, "-o", folder, "--threads", "1", *more)
        assert code == 0, err
        layouts = {t["layout"] for t in json.loads((folder / "losa.json").read_text())["linears"]}
        assert layouts == {"sliding"}
        code, _, err = losa("verify", folder, "--against", merged, "--threads", "1")
        assert code == 0, err


def test_pairs_of_rows_reach_both_runtimes(tiny_llama: Path, tmp_path: Path) -> None:
    """With masks that are stored once; q and k of a GGUF file, whose rows are reordered, have one per row."""
    flags = ["--pattern", "pair", "--sparsity", "0.7", "--set", "export.value_type=i3", "--offline"]
    merged = compressed_and_merged(tiny_llama, tmp_path, flags)
    for name, more in (("onnx", []), ("gguf", ["--packed"])):
        folder = tmp_path / name
        code, _, err = losa("export", merged, "-f", name, "-o", folder, "--threads", "1", *more)
        assert code == 0, err
        stored = json.loads((folder / "losa.json").read_text())["linears"]
        assert {t["layout"] for t in stored} == {"bitmask"}
        apart = {t["name"].rpartition(".")[2] for t in stored if "pairs of rows" not in t["reason"]}
        assert apart == (set() if name == "onnx" else {"q_proj", "k_proj"})
        code, _, err = losa("verify", folder, "--against", merged, "--threads", "1")
        assert code == 0, err


def test_a_portable_file_of_pairs_is_packed_in_pairs_when_it_is_loaded(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Although i4 rounded some of the kept weights to zero: rows share what either of them keeps."""
    packed, portable = held_by(export_both(tiny_llama, tmp_path, "--pattern", "pair", "--sparsity", "0.7"))
    assert 0.97 * packed <= portable <= packed


def test_a_portable_file_is_packed_as_sliding_when_it_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    """The zeros of its dense tensors tell the windows, although i4 rounded more weights to zero."""
    gguf = export_both(tiny_llama, tmp_path, "--pattern", "sliding")
    assert {t["layout"] for t in json.loads((gguf / "losa.json").read_text())["linears"]} == {"sliding"}
    packed, portable = held_by(gguf)
    assert packed == portable, "the packed file has sliding windows, and no other layout takes their bytes"


def export_both(model: Path, folder: Path, *flags: str) -> Path:
    """A folder with a packed and a portable file of i4 values of the model, pruned and no more."""
    adapted, merged, gguf = (folder / name for name in ("adapted", "merged", "gguf"))
    values = ["--value-type", "i4", "--set", "export.group_size=32", "--packed", "--portable"]
    plain = ["--prune-method", "wanda", "--adapt", "none", "--offline"]
    for argv in (
        ("compress", "-m", model, "-o", adapted, *SMALL, *flags, *plain),
        ("merge", adapted, "-m", model, "-o", merged, "--offline"),
        ("export", merged, "-f", "gguf", "-o", gguf, "--verify", "off", *values),
    ):
        code, _, err = losa(*argv)
        assert code == 0, err
    return gguf


def held_by(gguf: Path) -> tuple[int, int]:
    """Bytes that the plug-in holds of the packed and of the portable file, which compute the same logits."""
    pytest.importorskip("llama_cpp")
    from losa_deploy.runtimes.llamacpp.backend import attach
    from losa_deploy.runtimes.llamacpp.runtime import LlamaCppRuntime

    plugin = attach().plugin
    assert plugin is not None
    held, logits = [], []
    for path in sorted(gguf.glob("*.gguf"), key=lambda path: "LOSA" not in path.name):
        before = plugin.statistics()
        session = LlamaCppRuntime().open(path, threads=1)
        after = plugin.statistics()
        assert after.packed - before.packed == after.tensors - before.tensors == 21
        held.append(after.packed_bytes - before.packed_bytes)
        logits.append(session.logits(range(2, 40)))
        session.close()
    assert np.array_equal(*logits)
    return held[0], held[1]


def damage(merged: Path, model: SparseModel) -> None:
    """Keep other positions of one row: as many as before, but all at its end."""
    name = "model.layers.0.mlp.down_proj"
    mask = model.mask(name).copy()
    mask[0] = np.arange(mask.shape[1]) >= mask.shape[1] - mask[0].sum()
    masks = load_file(merged / MASK_FILE)
    key = next(k for k in masks if k.startswith(name))
    masks[key] = pack_mask(mask)
    save_file(masks, merged / MASK_FILE)
    document = json.loads((merged / "losa.json").read_text())
    (merged / "losa.json").write_text(json.dumps(document | {"files": hash_files(merged)}))


def printed(*flags: str) -> tuple[int, str, str]:
    return losa("compress", *flags, "--print-recipe")


def test_bits_set_the_sparsity_of_the_printed_recipe(tmp_path: Path) -> None:
    i4, i8 = (("--set", f"export.value_type={value_type}") for value_type in ("i4", "i8"))
    for flags, target in ((i8, 0.78125), (i4, 0.59375), ((*i4, "--pattern", "pair"), 0.46875)):
        code, out, err = printed("--bits", "2.75", *flags)
        assert code == 0, err
        assert f"\n  target: {target}\n" in out
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsity: {target: 0.9}\nexport: {value_type: i4, group_size: 32}\n")
    assert "\n  target: 0.6875\n" in printed("--recipe", str(file), "--bits", "2.75")[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--sparsity", "0.5"), "--sparsity and --bits"),
        (("--set", "sparsity.target=0.5"), "--sparsity and --bits"),
        (("--pattern", "sliding"), "take 3.125 bits per weight"),
        (("--pattern", "2:16"), "take 1.125 bits per weight"),
        (("--set", "export.value_type=f16"), "unpruned weights 16"),
    ],
    ids=str,
)
def test_bits_beside_what_already_says_it_are_refused(flags: tuple[str, ...], words: str) -> None:
    code, out, err = printed("--bits", "16", *flags)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
