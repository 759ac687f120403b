"""Training: it goes downhill towards the dense model, keeps what it must not touch, and resumes exactly."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from losa_deploy.compress import partial as partial_module
from losa_deploy.compress import walk as walk_module
from losa_deploy.compress.adapted import AdaptedModel
from losa_deploy.compress.data import Batches, phase_tokens
from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.losses import token_error
from losa_deploy.compress.memory import fits_at_once
from losa_deploy.compress.partial import Partial
from losa_deploy.compress.reconstruct import BlockTask, reconstruct_block
from losa_deploy.compress.schedule import compress
from losa_deploy.compress.student import Student
from losa_deploy.compress.train import NORM_RATE, Trained
from losa_deploy.compress.tune import ModelTask, tune
from losa_deploy.errors import GateError, InputError
from losa_deploy.manifest import SourceRecord, sha256_file
from losa_deploy.phases import DataRecipe, LossRecipe, PhaseRecipe
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe, load_recipe
from losa_deploy.sources.checkpoint import Checkpoint


def pruned(source: Checkpoint, *, scale: float = 1.0) -> Student:
    """A student that lost the smaller half of each row; what is kept is multiplied by `scale`."""
    student = Student(source)
    student.keep()
    for name in student.names:
        linear = student.masked(name)
        middle = linear.weight.abs().median(dim=1, keepdim=True).values
        linear.set_mask(linear.weight.abs() > middle, linear.effective() * scale)
    return student


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(5, 290, (24, 24), generator=torch.Generator().manual_seed(0))


def block_task(student: Student, dense: Decoder, tokens: torch.Tensor, names: tuple[str, ...]) -> BlockTask:
    stream = student.stream(tokens, 4)
    target = dense.advance(0, dense.stream(tokens, 4)).hidden
    return BlockTask(student, range(1), names, stream, target, "f32", target.shape[0])


def test_the_error_counts_every_token_alike() -> None:
    """The first too, which others attend to: a block whose loss leaves it out may lose it."""
    target = torch.ones(1, 4, 4)
    target[0, 0], target[0, 2] = 1000.0, 100.0
    assert float(token_error(target.clone(), target)) == 0.0
    for changed in range(3):
        output = target.clone()
        output[0, changed] *= 1.1  # 1 % of squared error in one of four tokens
        assert float(token_error(output, target)) == pytest.approx(0.0025, rel=1e-4), changed


def test_reconstruction_approaches_the_dense_block(tiny_llama: Path, tokens: torch.Tensor) -> None:
    """Against the dense output: a student whose own output were the target would have nothing to learn."""
    source = Checkpoint.open(tiny_llama)
    dense, student = Decoder(source), pruned(source, scale=0.8)
    names = student.block_linears(0)
    masks = {name: student.masked(name).mask.clone() for name in names}
    excluded = student.masked(names[2]).weight.clone()
    task = block_task(student, dense, tokens, tuple(n for n in names if n != names[2]))
    before, after = reconstruct_block(task, PhaseRecipe(learning_rate=0.02), 60, torch.Generator())
    assert after < 0.5 * before
    assert torch.equal(student.masked(names[2]).weight, excluded), "what is not named does not train"
    for name, mask in masks.items():
        linear = student.masked(name)
        assert torch.equal(linear.mask, mask) and not bool(linear.weight[~mask].any())
        assert not linear.weight.requires_grad


def test_reconstruction_that_fails_leaves_the_block(tiny_llama: Path, tokens: torch.Tensor) -> None:
    source = Checkpoint.open(tiny_llama)
    dense, student = Decoder(source), pruned(source)
    task = block_task(student, dense, tokens, student.block_linears(0))
    start = [student.masked(name).weight.clone() for name in task.names]
    before, after = reconstruct_block(task, PhaseRecipe(learning_rate=30.0), 4, torch.Generator())
    assert before == after
    assert all(torch.equal(student.masked(n).weight, w) for n, w in zip(task.names, start, strict=True))


def test_a_block_learns_on_its_grid(tiny_llama: Path, tokens: torch.Tensor) -> None:
    source = Checkpoint.open(tiny_llama)
    dense, student = Decoder(source), pruned(source)
    for name in student.block_linears(0):
        from losa_deploy.compress.grid import GridKind

        student.masked(name).put_on_grid(GridKind("i3", 32), None)
    phase = PhaseRecipe(train=("weights", "scales"), grid="i3", group_size=32, learning_rate=0.02)
    scales = student.masked(student.block_linears(0)[0]).scales.clone()
    task = block_task(student, dense, tokens, student.block_linears(0))
    before, after = reconstruct_block(task, phase, 60, torch.Generator())
    assert after < 0.8 * before
    assert not torch.equal(student.masked(student.block_linears(0)[0]).scales, scales)


def test_small_numbers_of_a_norm_move_little() -> None:
    """By a share of themselves, not of the largest: what keeps a huge channel small goes on doing so."""
    start = torch.tensor([1e-4, -0.5, 2.0])
    norm, bias = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(2))
    phase = PhaseRecipe(train=("norms",), learning_rate=0.1)
    trained = Trained([], phase, rest=[norm, bias])
    optimizer = torch.optim.AdamW(trained.groups, weight_decay=0.0)
    norm.grad, bias.grad = torch.ones(3), torch.ones(2)
    trained.step(optimizer)
    assert torch.allclose(norm.data, start - NORM_RATE * 0.1 * start.abs(), rtol=1e-4)
    assert torch.allclose(bias.data, torch.full((2,), -NORM_RATE * 0.1), rtol=1e-4), "none to be relative to"


@pytest.mark.parametrize(("rate", "better"), [(0.1, True), (300.0, False)])
def test_scales_and_norms_learn_for_levels_that_stay(
    rate: float, better: bool, tiny_llama: Path, tokens: torch.Tensor
) -> None:
    from losa_deploy.compress.grid import GridKind, levels

    source, kind = Checkpoint.open(tiny_llama), GridKind("i4", 32)
    dense, student = Decoder(source), pruned(source, scale=0.9)
    linears = [student.masked(name) for name in student.block_linears(0)]
    for linear in linears:
        linear.put_on_grid(kind, None)
        linear.settle()
    start = [(m.weight.clone(), levels(m.weight, m.scales, kind)) for m in linears]
    train = ("scales", "norms")
    phase = PhaseRecipe(train=train, grid="i4", group_size=32, learning_rate=rate, rate="probe")
    task = block_task(student, dense, tokens, student.block_linears(0))
    before, after = reconstruct_block(task, phase, 40, torch.Generator())
    assert after < 0.9 * before if better else after == before
    for linear, (weight, level) in zip(linears, start, strict=True):
        assert torch.equal(levels(linear.weight, linear.scales, kind), level)
        assert torch.equal(linear.weight, weight) != better
        assert torch.equal(linear.effective(), linear.weight) and linear.held is None


@pytest.mark.parametrize(
    "phase",
    [
        PhaseRecipe(where="model", learning_rate=0.01, batch_size=4),
        PhaseRecipe(where="model", learning_rate=0.01, batch_size=4, loss=LossRecipe(ce=1.0)),
        PhaseRecipe(where="model", train=("adapters",), rate="absolute", learning_rate=0.01, batch_size=4),
        PhaseRecipe(where="model", learning_rate=0.02, batch_size=4, rate="probe"),
    ],
    ids=["kl", "ce", "adapters", "probe"],
)
def test_phases_through_the_model_lower_their_loss(
    phase: PhaseRecipe, tiny_llama: Path, tmp_path: Path, tiny_text: str
) -> None:
    from losa_deploy.text.corpus import token_windows
    from losa_deploy.text.tokenizer import load_tokenizer

    text = torch.from_numpy(token_windows(load_tokenizer(tiny_llama), [tiny_text], 32, 40, 0))
    source = Checkpoint.open(tiny_llama)
    student = pruned(source, scale=0.9)
    if "adapters" in phase.train:
        for name in student.names:
            student.masked(name).set_rank(4, 2.0, torch.Generator().manual_seed(1))
    task = ModelTask(student, Decoder(source), student.names, text, phase, 40, "f32", 0, ("tune", 1, 0))
    losses = tune(task, Partial(tmp_path, 1), lambda done: None)
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert all(not bool(student.masked(n).weight[~student.masked(n).mask].any()) for n in student.names)


@pytest.mark.parametrize("train", [("weights", "scales"), ("adapters",)], ids=str)
def test_blocks_that_are_computed_twice_train_as_others_and_keep_less(
    train: tuple[str, ...], tiny_llama: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    """Less of the forward pass is kept for the backward pass; the weights are the same bits."""
    from losa_deploy.compress.grid import GridKind

    source, grid = Checkpoint.open(tiny_llama), "i4" if "scales" in train else "none"
    phase = PhaseRecipe.model_validate(
        {"where": "model", "train": train, "grid": grid, "group_size": 32, "batch_size": 4, "dropout": 0.1}
    )
    results, kept = [], []
    for recompute in (False, True):
        student = pruned(source, scale=0.9)
        for name in student.names:
            if grid == "i4":
                student.masked(name).put_on_grid(GridKind("i4", 32), None)
            else:
                student.masked(name).set_rank(4, 2.0, torch.Generator().manual_seed(1))
        labels = ("tune", 1, 0)
        task = ModelTask(
            student, Decoder(source), student.names, tokens, phase, 3, "f32", 0, labels, recompute=recompute
        )
        seen: list[int] = []

        def keep(tensor: torch.Tensor, seen: list[int] = seen) -> torch.Tensor:
            seen.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            tune(task, Partial(tmp_path / str(recompute), 1), lambda done: None)
        kept.append(sum(seen))
        results.append([m.effective() for m in map(student.masked, student.names)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert kept[1] < 0.3 * kept[0]


def test_memory_decides_whether_blocks_are_computed_twice(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    assert fits_at_once(source, 512, 10**9)
    assert not fits_at_once(source, 512, 450_000_000)
    assert not fits_at_once(source, 10**6, 10**9)


def test_a_loss_that_is_not_finite_ends_the_run(
    tiny_llama: Path, tokens: torch.Tensor, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny_llama)
    student = pruned(source)
    student.masked(student.names[0]).weight.data[0] = float("nan")
    phase = PhaseRecipe(where="model", batch_size=4)
    task = ModelTask(student, Decoder(source), student.names, tokens, phase, 2, "f32", 0, ("tune",))
    with pytest.raises(GateError, match="step 1 of 2 became nan"):
        tune(task, Partial(tmp_path, 1), lambda done: None)


def test_batches_are_shuffled_epochs() -> None:
    batches = Batches(10, 4, 0, "x")
    seen = [index for number in range(5) for index in batches[number]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:] and seen[:10] != list(range(10))
    assert Batches(10, 4, 0, "x")[3] == batches[3] and Batches(10, 4, 1, "x")[3] != batches[3]


def test_sources_are_mixed_by_their_shares(tiny_llama: Path, tiny_text: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text)
    calibration = torch.zeros(12, 32, dtype=torch.int64)
    mixed = (DataRecipe(share=0.75), DataRecipe(source=str(text), share=0.25))
    found = phase_tokens(PhaseRecipe(where="model", data=mixed), calibration, tiny_llama, 0)
    assert found.shape == (16, 32)
    assert int((found == 0).all(dim=1).sum()) == 12
    longer = PhaseRecipe(where="model", data=(DataRecipe(source=str(text)),), sequence_length=64)
    assert phase_tokens(longer, calibration, tiny_llama, 0).shape[1] == 64
    with pytest.raises(InputError, match="sequences of 32 tokens, the phase asks for 64"):
        phase_tokens(PhaseRecipe(where="model", sequence_length=64), calibration, tiny_llama, 0)
    text.write_text("few")
    with pytest.raises(InputError, match="fewer than one sequence"):
        phase_tokens(longer, calibration, tiny_llama, 0)


PHASES: list[dict[str, object]] = [
    {"train": ["weights", "norms"], "where": "blocks", "tokens": 512, "batch_size": 4},
    {"train": ["weights"], "where": "blocks", "window": 2, "grid": "i4", "tokens": 512, "batch_size": 2},
    {
        "train": ["weights", "scales", "norms"],
        "where": "model",
        "grid": "i4",
        "tokens": 1024,
        "batch_size": 4,
    },
]


def chosen(phases: Sequence[Mapping[str, object]] = PHASES) -> Recipe:
    return load_recipe(
        overrides=[
            ("calibration.samples", 12),
            ("calibration.sequence_length", 32),
            ("phases", phases),
            ("precision", "f32"),
        ]
    )


def run(folder: Path, out: Path, progress: object = no_progress) -> AdaptedModel:
    record = SourceRecord(id="tiny", files={"model.safetensors": sha256_file(folder / "model.safetensors")})
    return compress(Checkpoint.open(folder), record, chosen(), out, progress=progress)  # type: ignore[arg-type]


def hashes(model: AdaptedModel) -> dict[str, str]:
    return model.state.files


@pytest.mark.parametrize(("label", "after"), [("pruning", 2), ("phase 2", 5)])
def test_an_interrupted_run_goes_on_where_it_was(
    label: str, after: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside of the blocks at the next block, inside of a phase at the last saved step: equal bytes."""
    monkeypatch.setattr(partial_module, "SAVE_SECONDS", 0.0)
    whole = run(tiny_llama, tmp_path / "whole")
    assert whole.state.grids and [t.phase for t in whole.state.training] == [0, 1, 2]
    assert not (tmp_path / "whole" / "partial").exists()

    def stop(done: int, total: int, text: str) -> None:
        if label in text and done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "cut", stop)
    seen: list[tuple[str, int]] = []
    resumed = run(tiny_llama, tmp_path / "cut", lambda done, total, text: seen.append((text, done)))
    assert hashes(resumed) == hashes(whole)
    if label == "phase 2":
        assert min(done for text, done in seen if label in text) == after
    assert resumed.state.training == whole.state.training


def test_ten_kills_in_one_run_change_no_byte(tiny_llama: Path, tmp_path: Path) -> None:
    """By SIGKILL, between any two changes of files or pieces of work; see `killed.py`."""
    last = {**PHASES[2], "tokens": 5120}
    recipe, folders = tmp_path / "recipe.json", (tmp_path / "whole", tmp_path / "cut")
    recipe.write_text(chosen([*PHASES[:2], last]).model_dump_json(), "utf-8")
    program = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(program), str(tiny_llama), str(recipe), *map(str, folders), "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, *kills, end = done.stdout.splitlines()
    assert len(kills) == 10
    for fatal, code, seen in map(str.split, kills):
        assert int(code) == -signal.SIGKILL and seen == fatal
    fatal, code, seen = end.split()
    assert (fatal, code) == ("0", "0")
    assert int(seen) < 0.5 * int(first), "what was done before the kills was not done again"
    whole, cut = (AdaptedModel.open(folder) for folder in folders)
    assert hashes(cut) == hashes(whole)
    assert cut.state.training == whole.state.training
    left = [{path.relative_to(model.folder) for path in model.folder.rglob("*")} for model in (cut, whole)]
    assert left[0] == left[1]


def test_a_damaged_point_is_not_trusted(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial_module, "SAVE_SECONDS", 0.0)
    whole = run(tiny_llama, tmp_path / "whole")

    def stop(done: int, total: int, text: str) -> None:
        if "phase 2" in text and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_llama, tmp_path / "cut", stop)
    (point,) = (tmp_path / "cut" / "partial").glob("point.*.safetensors")
    for path in (point, point.with_name("block-00001.safetensors")):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    assert hashes(run(tiny_llama, tmp_path / "cut")) == hashes(whole)


def test_two_neighbours_train_together_towards_the_later_one(tiny_llama: Path, tokens: torch.Tensor) -> None:
    """The first learns although only the output of the second counts, and the last step ends on it."""
    source = Checkpoint.open(tiny_llama)
    student, dense = pruned(source), Decoder(source)
    names = (*student.block_linears(0), *student.block_linears(1))
    target = dense.advance(1, dense.advance(0, dense.stream(tokens, 4))).hidden
    task = BlockTask(student, range(2), names, student.stream(tokens, 4), target, "f32", target.shape[0])
    start = {name: student.masked(name).weight.clone() for name in names}
    phase = PhaseRecipe(learning_rate=0.02, batch_size=4)
    before, after = reconstruct_block(task, phase, 40, torch.Generator().manual_seed(0))
    assert after < 0.8 * before
    assert not [name for name in names if torch.equal(student.masked(name).weight, start[name])]
    reached = student.advance(1, student.advance(0, student.stream(tokens, 4))).hidden
    held = token_error(reached[-2:], target[-2:])
    assert float(held) == pytest.approx(after, rel=1e-4), "the last tenth is what it was judged on"


def test_every_block_is_trained_towards_the_dense_stream(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not towards what the dense block would make of the student's own, already pruned stream."""
    source = Checkpoint.open(tiny_llama)
    seen: dict[int, torch.Tensor] = {}
    together: list[tuple[int, ...]] = []

    def spy(task: BlockTask, *rest: object) -> tuple[float, float]:
        seen[task.blocks[-1]] = task.target
        together.append(tuple(task.blocks))
        return reconstruct_block(task, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(walk_module, "reconstruct_block", spy)
    model = run(tiny_llama, tmp_path / "adapted")
    # The second block phase has windows of two; the first block has no neighbour before it.
    assert together == [(0,), (0,), (1,), (0, 1), (2,), (1, 2)]
    dense = Decoder(source)
    stream = dense.stream(load_file(model.folder / "calibration.safetensors")["tokens"], 4)
    for block in range(3):
        stream = dense.advance(block, stream)
        assert torch.allclose(seen[block], stream.hidden, atol=1e-4), block
