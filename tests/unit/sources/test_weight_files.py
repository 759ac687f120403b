"""Which file a tensor comes from: the same one that transformers takes, or a refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from losa_deploy.assemble import assemble
from losa_deploy.errors import InputError
from losa_deploy.pretrained import load_model
from losa_deploy.sources.checkpoint import Checkpoint, write_weights
from losa_deploy.sources.weight_files import INDEX_FILE, SINGLE_FILE, files_used, weight_files


@pytest.fixture
def sharded(tiny_llama: Path, tmp_path: Path) -> Path:
    """`tiny_llama` in several shards with an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copyfile(tiny_llama / "config.json", folder / "config.json")
    whole = Checkpoint.open(tiny_llama)
    write_weights(folder, ((n, whole.tensor(n)) for n in whole.files), shard_bytes=100_000)
    assert len(set(weight_files(folder).values())) > 2
    return folder


def assert_as_in_transformers(folder: Path) -> None:
    """Every tensor of the checkpoint is the one in the model that transformers loads."""
    checkpoint = Checkpoint.open(folder)
    loaded = load_model(folder).state_dict()
    for name in checkpoint.files:
        assert torch.equal(checkpoint.tensor(name).float(), loaded[name]), name
    for name, parameter in assemble(checkpoint).named_parameters():
        assert torch.equal(parameter, loaded[name]), name


def test_a_single_file_wins_over_an_older_index_and_its_shards(sharded: Path, tiny_llama: Path) -> None:
    newer = {name: tensor + 0.5 for name, tensor in load_file(tiny_llama / SINGLE_FILE).items()}
    save_file(newer, sharded / SINGLE_FILE, metadata={"format": "pt"})
    assert set(weight_files(sharded).values()) == {sharded / SINGLE_FILE}
    assert files_used(sharded) == (SINGLE_FILE,)
    assert_as_in_transformers(sharded)


def test_a_tensor_that_the_index_leaves_out_is_taken_from_its_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    left_out = "model.layers.1.mlp.up_proj.weight"
    place = index["weight_map"].pop(left_out)
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert weight_files(sharded)[left_out] == sharded / place
    assert files_used(sharded)[0] == INDEX_FILE
    assert_as_in_transformers(sharded)


def test_of_two_shards_with_one_tensor_the_later_wins(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_FILE).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    twice = next(name for name, file in index["weight_map"].items() if file == first)
    tensors = load_file(sharded / last)
    save_file(
        {**tensors, twice: torch.ones_like(load_file(sharded / first)[twice])},
        sharded / last,
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match=f"it lists {twice} in {first}, but the tensor is in {last}"):
        weight_files(sharded)
    del index["weight_map"][twice]
    (sharded / INDEX_FILE).write_text(json.dumps(index))
    assert weight_files(sharded)[twice] == sharded / last
    assert_as_in_transformers(sharded)


def broken(index: dict[str, object], kind: str) -> str:
    """The text of an index with one fault."""
    places = index["weight_map"]
    assert isinstance(places, dict)
    name = "model.layers.1.mlp.up_proj.weight"
    match kind:
        case "wrong shard":
            places[name] = next(f for f in sorted(set(places.values())) if f != places[name])
        case "unknown tensor":
            places["model.layers.1.mlp.lost.weight"] = places[name]
        case "missing shard":
            places[name] = "model-00009-of-00009.safetensors"
        case "way out":
            places[name] = "../" + places[name]
        case "no map":
            index = {"metadata": {}}
        case "no metadata":
            del index["metadata"]
        case "list":
            return "[]"
        case "cut":
            return json.dumps(index)[:200]
    return json.dumps(index)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("wrong shard", "it lists model.layers.1.mlp.up_proj.weight in .*, but the tensor is in"),
        ("unknown tensor", "it lists model.layers.1.mlp.lost.weight in .*, which does not hold it"),
        ("missing shard", "it names model-00009-of-00009.safetensors, which is not there"),
        ("way out", "expected the name of a file beside it"),
        ("no map", "it has no weight_map"),
        ("no metadata", "it has no metadata"),
        ("list", "it has no weight_map"),
        ("cut", "it cannot be read as JSON"),
    ],
)
def test_a_broken_index_is_refused_by_name(sharded: Path, kind: str, words: str) -> None:
    path = sharded / INDEX_FILE
    (sharded.parent / "model-00001-of-00004.safetensors").write_bytes(b"")
    path.write_text(broken(json.loads(path.read_text()), kind))
    with pytest.raises(InputError, match=words) as caught:
        Checkpoint.open(sharded)
    assert str(path) in caught.value.message
