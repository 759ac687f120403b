"""Streams past a limit lie in files without names, and nothing else changes."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.device import CPU, Room
from losa_deploy.compress.losses import token_error
from losa_deploy.compress.schedule import compress
from losa_deploy.compress.streams import Streams
from losa_deploy.manifest import SourceRecord
from losa_deploy.progress import no_progress
from losa_deploy.recipe import load_recipe
from losa_deploy.sources.checkpoint import Checkpoint

SHAPE = (4, 5, 6)
BYTES = 4 * 4 * 5 * 6


def mapped_files(folder: Path) -> list[str]:
    """Files under `folder`, deleted or not, that this process has mapped."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_what_is_past_the_limit_lies_in_a_file_without_a_name(tmp_path: Path) -> None:
    streams = Streams(tmp_path / "new", 2 * BYTES)
    first, second = streams.empty(SHAPE, CPU), streams.empty(SHAPE, CPU)
    assert streams.held == 2 * BYTES and not mapped_files(tmp_path)
    third = streams.empty(SHAPE, CPU)
    third.copy_(torch.arange(120.0).view(SHAPE))
    assert third.shape == SHAPE and third.dtype == torch.float32
    assert third.sum() == 119 * 120 / 2
    assert len(mapped_files(tmp_path)) == 1 and not list((tmp_path / "new").iterdir())
    assert streams.held == 2 * BYTES
    part = third[1]
    del third
    assert part.sum() == sum(range(30, 60))  # the file stays as long as a part of it is in use
    del part, first
    gc.collect()
    assert not mapped_files(tmp_path) and streams.held == BYTES
    again = streams.empty(SHAPE, CPU)
    assert not mapped_files(tmp_path) and streams.held == 2 * BYTES
    del again, second
    assert streams.held == 0


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Streams(tmp_path, 0).empty(SHAPE, CPU)
    assert not list(tmp_path.iterdir())


def test_a_compression_with_streams_in_files_leaves_the_same_bytes(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    mapped = Streams._mapped

    def spy(streams: Streams, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made.append(1)
        return mapped(streams, shape, dtype)

    monkeypatch.setattr(Streams, "_mapped", spy)
    blocks = {"train": ["weights", "scales"], "grid": "export", "tokens": 300, "window": 2}
    chosen = load_recipe(
        overrides={
            "calibration.samples": 12,
            "calibration.sequence_length": 24,
            "precision": "f32",
            "phases": [blocks],
        }.items()
    )
    counts = []
    for name, memory in (("files", 1), ("memory", 10**12)):
        source, record = Checkpoint.open(tiny_llama), SourceRecord(id="someone/tiny")
        room = Room(memory=memory)
        compress(source, record, chosen, tmp_path / name, progress=no_progress, room=room)
        counts.append(len(made))
    assert counts[0] >= 3 * 3 and counts[1] == counts[0]
    found, expected = (
        {path.relative_to(tmp_path / name): load_file(path) for path in (tmp_path / name).rglob("*.safe*")}
        for name in ("files", "memory")
    )
    assert found.keys() == expected.keys() and len(found) == 4
    for path, tensors in expected.items():
        assert all(torch.equal(found[path][key], value) for key, value in tensors.items()), path


def test_streams_in_bf16_take_half_and_are_near_those_in_f32(tiny_llama: Path, tmp_path: Path) -> None:
    """After every block; what a block reads is f32 again."""
    tokens = torch.randint(5, 290, (6, 32), generator=torch.Generator().manual_seed(0))
    dense, hidden = Decoder(Checkpoint.open(tiny_llama)), {}
    for dtype in (torch.float32, torch.bfloat16):
        dense.streams = Streams(tmp_path, 10**9, dtype)
        stream = dense.stream(tokens, 4)
        assert stream.hidden.dtype == dtype and dense.streams.held == 6 * 32 * 64 * dtype.itemsize
        for block in range(3):
            stream = dense.advance(block, stream)
        assert stream.rows(slice(2, 4)).dtype == torch.float32
        hidden[dtype] = dense.finish(stream)
    error = float(token_error(hidden[torch.bfloat16].float(), hidden[torch.float32]))
    assert 0 < error < 1e-4, "rounding of 2^-9 a few times over, squared"


def test_a_compression_with_streams_in_bf16_comes_out_alike(tiny_llama: Path, tmp_path: Path) -> None:
    """Blocks are as near to the dense ones, norms learn through the model, and files hold half."""
    blocks = {"train": ["weights", "scales"], "grid": "export", "tokens": 300, "window": 2}
    norms = {"train": ["norms"], "where": "model", "grid": "export", "tokens": 200}
    found = {}
    for kind in ("f32", "bf16"):
        chosen = load_recipe(
            overrides={
                "calibration.samples": 12,
                "calibration.sequence_length": 24,
                "precision": "f32",
                "streams": kind,
                "phases": [blocks, norms],
            }.items()
        )
        source, record = Checkpoint.open(tiny_llama), SourceRecord(id="someone/tiny")
        model = compress(source, record, chosen, tmp_path / kind, progress=no_progress, room=Room(memory=1))
        found[kind] = model.state
    for one, other in zip(found["f32"].block_error, found["bf16"].block_error, strict=True):
        assert other == pytest.approx(one, rel=0.15) and other != one
    last = [state.training[1].losses[-1] for state in found.values()]
    assert last[1] == pytest.approx(last[0], rel=0.2)
