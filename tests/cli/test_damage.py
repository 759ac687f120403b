"""A flipped byte in the work of an earlier run is noticed, said, and made again; it is never published."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from losa_deploy.cli.main import main
from losa_deploy.compress.adapted import read_state
from losa_deploy.errors import InputError
from losa_deploy.manifest import Manifest
from losa_deploy.seal import damage, seal

FLAGS = ["--samples", "4", "--sequence-length", "32", "--steps", "2", "--adapt-steps", "2", "--threads", "1"]
FLAGS += ["--text-tokens", "128", "--window", "64", "--offline", "--overwrite"]


def losa(*words: str | Path) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, err.getvalue()


def whole_path(model: Path, output: Path) -> tuple[int, str]:
    return losa("compress-and-export", "-m", model, "-f", "onnx", "-o", output, *FLAGS)


def flip(path: Path, where: int = -7) -> None:
    """Change one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)


def weights(output: Path) -> dict[str, str]:
    return Manifest.read(output).files


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run, with its work folder."""
    output = tmp_path_factory.mktemp("finished") / "demo"
    code, err = whole_path(tiny_llama, output)
    assert code == 0, err
    return output


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    for name in ("demo", "demo.work"):
        shutil.copytree(finished.with_name(name), tmp_path / name)
    return tmp_path / "demo"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("merged/model.safetensors", "merging again"),
        ("dense-onnx/model.onnx.data", "writing the dense baseline again"),
    ],
)
def test_a_flipped_byte_is_said_and_made_again(
    name: str, words: str, copy: Path, finished: Path, tiny_llama: Path
) -> None:
    work = copy.with_name("demo.work")
    before = (work / name).read_bytes()
    flip(work / name)
    code, err = whole_path(tiny_llama, copy)
    assert code == 0, err
    said = [line for line in err.splitlines() if words in line]
    assert len(said) == 1 and str(work / name) in said[0], err
    assert (work / name).read_bytes() == before
    assert weights(copy) == weights(finished)


@pytest.mark.slow
def test_a_changed_number_in_the_manifest_of_the_merged_model_is_noticed(
    copy: Path, finished: Path, tiny_llama: Path
) -> None:
    path = copy.with_name("demo.work") / "merged" / "losa.json"
    document = json.loads(path.read_text())
    document["sparsity_achieved"] = 0.875
    path.write_text(json.dumps(document))
    code, err = whole_path(tiny_llama, copy)
    assert code == 0, err
    assert f"{path} changed since it was written: merging again" in err
    assert Manifest.read(copy).sparsity_achieved == Manifest.read(finished).sparsity_achieved


@pytest.mark.parametrize(
    "name",
    [
        "step-02/block-00001.safetensors",
        pytest.param("state.json", marks=pytest.mark.slow),
    ],
)
def test_damaged_compression_state_is_compressed_again(
    name: str, copy: Path, finished: Path, tiny_llama: Path
) -> None:
    work = copy.with_name("demo.work")
    shutil.rmtree(work / "merged")
    path = work / "adapted" / name
    if name == "state.json":
        text = path.read_text()
        assert '"step": 2' in text
        path.write_text(text.replace('"seed": 0', '"seed": 8'))
    else:
        flip(path)
    code, err = whole_path(tiny_llama, copy)
    assert code == 0, err
    assert f"{path} changed since it was written: compressing again" in err
    assert weights(copy) == weights(finished)


@pytest.mark.parametrize(
    "name",
    ["merged/masks.safetensors", "merged/config.json", "dense-onnx/model.onnx"],
)
def test_a_flipped_byte_of_any_file_breaks_the_seal(name: str, copy: Path) -> None:
    """What is done about it does not depend on the file, see above."""
    path = copy.with_name("demo.work") / name
    assert damage(path.parent) == ""
    flip(path, path.read_bytes().rindex(b"1") if name.endswith(".json") else -7)
    assert damage(path.parent) == f"{path} changed since it was written"


def test_a_flipped_byte_of_the_calibration_is_noticed(copy: Path) -> None:
    adapted = copy.with_name("demo.work") / "adapted"
    assert read_state(adapted) is not None
    flip(adapted / "calibration.safetensors")
    with pytest.raises(InputError, match=r"calibration\.safetensors changed since it was written"):
        read_state(adapted)


def test_intact_work_is_reused_without_a_word(copy: Path, tiny_llama: Path) -> None:
    code, err = whole_path(tiny_llama, copy)
    assert code == 0 and "reusing" in err
    assert " again." not in err and "warning" not in err


def test_merge_refuses_damaged_state_and_export_a_damaged_merged_model(
    copy: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    work = copy.with_name("demo.work")
    flip(work / "adapted" / "step-02" / "block-00000.safetensors")
    code, err = losa("merge", work / "adapted", "-m", tiny_llama, "-o", tmp_path / "m")
    assert code == 3 and "block-00000.safetensors changed since it was written" in err
    flip(work / "merged" / "model.safetensors")
    code, err = losa("export", work / "merged", "-f", "onnx", "-o", tmp_path / "e")
    assert code == 6 and "merged is damaged: model.safetensors: found sha256" in err
    assert not (tmp_path / "m").exists() and not (tmp_path / "e").exists()


def test_a_seal_covers_what_is_changed_added_and_missing(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("one")
    assert damage(folder) == f"{folder} was not finished"
    seal(folder)
    assert damage(folder) == ""
    (folder / "b.txt").write_text("two")
    assert damage(folder) == f"{folder / 'b.txt'} was added since it was written"
    (folder / "b.txt").unlink()
    (folder / "inner" / "a.txt").write_text("One")
    assert damage(folder) == f"{folder / 'inner/a.txt'} changed since it was written"
    (folder / "inner" / "a.txt").unlink()
    assert damage(folder) == f"{folder / 'inner/a.txt'} is missing since it was written"


def test_a_damaged_conversion_of_a_gguf_file_is_made_again(tmp_path: Path, tiny_llama: Path) -> None:
    from losa_deploy.progress import no_progress
    from losa_deploy.sources.gguf import convert_gguf

    code, err = losa(
        "compress-and-export", "-m", tiny_llama, "-f", "gguf", "-o", tmp_path / "g", "--verify", "off", *FLAGS
    )
    assert code == 0, err
    file = next((tmp_path / "g").glob("*.gguf"))
    said: list[str] = []
    first, _ = convert_gguf(file, "tiny", tmp_path / "source", no_progress, said.append)
    before = (first.folder / "model.safetensors").read_bytes()
    flip(first.folder / "model.safetensors")
    again, _ = convert_gguf(file, "tiny", tmp_path / "source", no_progress, said.append)
    assert said == [
        f"{first.folder / 'model.safetensors'} changed since it was written: converting {file.name} again."
    ]
    assert (again.folder / "model.safetensors").read_bytes() == before
