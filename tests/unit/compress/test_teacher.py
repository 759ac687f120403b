"""Distillation from the likeliest tokens, noted before training: near the whole model, bounded, resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from losa_deploy.compress import partial as partial_module
from losa_deploy.compress import schedule as schedule_module
from losa_deploy.compress.adapted import AdaptedModel
from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.device import Room
from losa_deploy.compress.losses import Likeliest
from losa_deploy.compress.partial import Partial
from losa_deploy.compress.schedule import compress
from losa_deploy.compress.streams import Streams
from losa_deploy.compress.student import Student
from losa_deploy.compress.teacher import Cached, is_cached
from losa_deploy.compress.team import ALONE, Team
from losa_deploy.compress.tune import ModelTask, sequences_read, tune
from losa_deploy.manifest import SourceRecord
from losa_deploy.phases import PhaseRecipe
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe, load_recipe
from losa_deploy.sources.checkpoint import Checkpoint

Stored = Callable[[Path], dict[str, torch.Tensor]]
Distance = Callable[[torch.Tensor, torch.Tensor], float]
BASE: Mapping[str, object] = {
    "calibration.samples": 10,
    "calibration.sequence_length": 24,
    "calibration.start": "random",
    "precision": "f32",
    "prune.method": "magnitude",
}
PHASE = {"train": ["weights", "norms"], "where": "model", "tokens": 600, "batch_size": 4}
VOCABULARY = 300


def chosen(text: Path | None = None, **changes: object) -> Recipe:
    phase = {**PHASE, **changes}
    if text is not None:
        phase["data"] = [{"source": str(text)}]
    return load_recipe(overrides={**BASE, "phases": [phase]}.items())


def made(
    source: Path, recipe: Recipe, out: Path, memory: int = 10**11, progress: object = None
) -> AdaptedModel:
    return compress(
        Checkpoint.open(source), SourceRecord(id="someone/tiny"), recipe, out,
        progress=progress or no_progress, room=Room(memory=memory),  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture
def text(tmp_path: Path, tiny_text: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny_text[:6000], "utf-8")
    return path


@pytest.mark.parametrize("other", [False, True], ids=["calibration", "other text"])
def test_all_tokens_teach_what_the_dense_model_does_and_few_nearly_so(
    other: bool, tiny_llama: Path, text: Path, tmp_path: Path, stored: Stored, distance: Distance
) -> None:
    given = text if other else None
    exact = made(tiny_llama, chosen(given, teacher="resident"), tmp_path / "exact")
    whole = made(tiny_llama, chosen(given, teacher="cached", top_k=VOCABULARY), tmp_path / "whole")
    few = made(tiny_llama, chosen(given, teacher="cached", top_k=16), tmp_path / "few")
    expected = stored(exact.folder)
    for name, tensor in stored(whole.folder).items():
        assert distance(tensor, expected[name]) < 1e-4, name
    losses = [model.state.training[0].losses for model in (exact, whole, few)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] == pytest.approx(losses[0], rel=0.2) and losses[2] != losses[0]
    assert losses[2][0] < losses[0][0], "of the same student, and what the rest hides is left out"


def test_what_is_noted_lies_in_files_where_memory_is_short_and_resumes(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "SAVE_SECONDS", -1.0)
    files: list[torch.dtype] = []
    mapped = Streams._mapped

    def spy(streams: Streams, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        files.append(dtype)
        return mapped(streams, shape, dtype)

    monkeypatch.setattr(Streams, "_mapped", spy)
    recipe = chosen(text, teacher="cached")
    plenty = made(tiny_llama, recipe, tmp_path / "plenty")
    assert not files

    def stop(done: int, total: int, label: str) -> None:
        if "phase 0" in label and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tiny_llama, recipe, tmp_path / "short", 1, stop)
    assert torch.int32 in files, "the numbers of tokens lie in a file"
    seen: list[int] = []
    short = made(
        tiny_llama, recipe, tmp_path / "short", 1,
        lambda done, total, label: seen.append(done) if "phase 0" in label else None,
    )  # fmt: skip
    assert seen[0] == 3
    assert short.state.files == plenty.state.files


def test_the_states_of_the_walk_are_gone_while_a_noted_teacher_is_used(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, int] = {}
    for kind in ("resident", "cached"):

        def spy(task: ModelTask, partial: Partial, report: Callable[[int], None], kind: str = kind) -> object:
            assert task.dense.streams is not None and isinstance(task.teacher, Cached) == (kind == "cached")
            held[kind] = task.dense.streams.held
            return tune(task, partial, report)

        monkeypatch.setattr(schedule_module, "tune", spy)
        made(tiny_llama, chosen(teacher=kind), tmp_path / kind)
    assert held == {"resident": 4 * 10 * 24 * 64, "cached": 0}


def test_memory_decides_for_other_text_and_a_run_keeps_its_decision(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "SAVE_SECONDS", -1.0)
    seen: list[bool] = []

    def spy(task: ModelTask, partial: Partial, report: Callable[[int], None]) -> object:
        seen.append(isinstance(task.teacher, Cached))
        assert task.dense.is_open(0) != seen[-1], "a dense model that runs in every step is in memory"
        if (tmp_path / "stop").exists():
            raise KeyboardInterrupt
        return tune(task, partial, report)

    monkeypatch.setattr(schedule_module, "tune", spy)
    plain = made(tiny_llama, chosen(text), tmp_path / "plenty")
    short = made(tiny_llama, chosen(text), tmp_path / "short", 1)
    (tmp_path / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        made(tiny_llama, chosen(text), tmp_path / "cut")
    (tmp_path / "stop").unlink()
    cut = made(tiny_llama, chosen(text), tmp_path / "cut", 1)
    assert seen == [False, True, False, False]
    assert cut.state.files == plain.state.files != short.state.files


def test_what_recipe_and_memory_say(tmp_path: Path) -> None:
    for kind, short, expected in (
        ("cached", False, True),
        ("resident", True, False),
        ("auto", True, True),
        ("auto", False, False),
    ):
        phase = PhaseRecipe(where="model", teacher=kind)  # type: ignore[arg-type]
        partial = Partial(tmp_path / f"{kind}{short}", 1)
        assert is_cached(phase, "teacher-0", partial, ALONE, short=short) == expected
        assert is_cached(phase, "teacher-0", partial, ALONE, short=not short) == expected


@pytest.mark.parametrize("rate", ["relative", "probe"])
def test_only_sequences_that_training_reads_are_noted(rate: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Of a long text a phase reads a little."""
    phase = PhaseRecipe.model_validate({**PHASE, "batch_size": 2, "rate": rate})
    read = sequences_read(1000, phase, 8, 0, ("tune", 1, 0), ALONE)
    assert 0 < len(read) <= 2 * (8 + (3 if rate == "probe" else 0))
    shared = [sequences_read(1000, phase, 8, 0, ("tune", 1, 0), Team(rank, 2)) for rank in (0, 1)]
    assert {*shared[0], *shared[1]} == {*read, 0, 1}
    assert all(index % 2 == rank for rank in (0, 1) for index in shared[rank])

    class Noting(dict[int, int]):
        def __getitem__(self, index: int) -> int:
            asked.add(index)
            return 0

    asked: set[int] = set()
    source = Checkpoint.open(tiny_llama)
    tokens = torch.zeros(1000, 8, dtype=torch.int64)
    known = Likeliest(
        torch.zeros(1, 8, 1, dtype=torch.int32), torch.full((1, 8, 1), -0.7), torch.full((1, 8), 0.5)
    )
    student = Student(source).keep()
    task = ModelTask(
        student, Decoder(source), student.names, tokens, phase, 8, "f32", 0, ("tune", 1, 0),
        teacher=Cached(known, Noting()),
    )  # fmt: skip
    tune(task, Partial(tmp_path, 1), lambda done: None)
    assert sorted(asked) == read
