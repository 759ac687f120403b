"""The outer loop on a small trained model: every mode keeps its masks, resumes and repeats itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from losa_deploy.compress import allocate
from losa_deploy.compress import schedule as schedule_module
from losa_deploy.compress import tune as tune_module
from losa_deploy.compress.adapted import AdaptedModel, read_state, step_folder
from losa_deploy.compress.decoder import Decoder, batch_size
from losa_deploy.compress.device import Room
from losa_deploy.compress.schedule import compress, rmi_importance
from losa_deploy.compress.student import Student
from losa_deploy.compress.walk import walk_blocks
from losa_deploy.errors import InputError
from losa_deploy.manifest import SourceRecord, sha256_file
from losa_deploy.progress import no_progress
from losa_deploy.recipe import Recipe, load_recipe
from losa_deploy.sources.checkpoint import Checkpoint

BASE = {
    "calibration.samples": 12,
    "calibration.sequence_length": 48,
    "allocation.samples": 12,
    "allocation.method": "rmi",
    "schedule.steps": 2,
    "adapt.steps": 6,
    "adapt.batch_size": 4,
}


SMALL_QUICK = {
    "phases": [
        {"train": ["weights", "scales"], "grid": "export", "tokens": 300},
        {"train": ["norms"], "where": "model", "grid": "export", "tokens": 1000, "learning_rate": 0.05},
    ]
}


def recipe(**changes: object) -> Recipe:
    """The quick preset, small, with `section__key=value` changes."""
    values = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return load_recipe(overrides=values.items())


def source_of(folder: Path) -> tuple[Checkpoint, SourceRecord]:
    return Checkpoint.open(folder), SourceRecord(
        id="tiny", files={"model.safetensors": sha256_file(folder / "model.safetensors")}
    )


def run(folder: Path, out: Path, chosen: Recipe) -> AdaptedModel:
    checkpoint, record = source_of(folder)
    return compress(checkpoint, record, chosen, out, progress=no_progress)


def shard_hashes(out: Path, step: int) -> list[str]:
    return [sha256_file(path) for path in sorted(step_folder(out, step).iterdir())]


@pytest.mark.parametrize(
    "changes",
    [
        {"adapt__mode": "reconstruct"},
        {"adapt__mode": "adapters", "prune__method": "wanda", "adapt__learning_rate": 1e-3},
        {"adapt__mode": "adapters", "adapt__loss": "ce", "rank__error": "cumulative", "rank__scale": 1.5},
        {"adapt__mode": "direct", "prune__method": "magnitude", "allocation__method": "slope"},
        {"adapt__mode": "none", "prune__regrow": True, "allocation__method": "uniform"},
        {"adapt__mode": "none", "prune__method": "wanda", "prune__regrow": True, "sparsity__scope": "row"},
    ],
    ids=str,
)
def test_every_mode_ends_on_target_with_zeros_outside_the_mask(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    model = run(tiny_llama, tmp_path / "adapted", recipe(sparsity__target=0.6, **changes))
    pruned = total = 0
    for block in range(3):
        for linear in model.block(block).values():
            outside = linear.merged()[~linear.mask]
            assert not bool(outside.view(torch.int32).any())
            assert bool((linear.weight[~linear.mask] == 0).all())
            pruned += int((~linear.mask).sum())
            total += linear.mask.numel()
    # Counts are whole positions per row (or per 128 columns), so the total can be off by half a row.
    assert pruned / total == pytest.approx(0.6, abs=0.5 / 64)
    weights = np.array(model.state.block_sparsity)
    assert weights.mean() == pytest.approx(pruned / total, abs=1e-9)


def test_ranks_follow_errors_and_meet_the_budget(tiny_llama: Path, tmp_path: Path) -> None:
    chosen = recipe(adapt__mode="adapters", rank__start=4, rank__end=5, rank__maximum=8)
    model = run(tiny_llama, tmp_path / "adapted", chosen)
    assert sum(model.state.block_rank) == 15
    errors, ranks = model.state.block_error, model.state.block_rank
    assert sorted(range(3), key=lambda i: errors[i])[-1] in [i for i in range(3) if ranks[i] == max(ranks)]
    for block, rank in enumerate(ranks):
        assert {linear.lora_a.shape[0] for linear in model.block(block).values()} == {rank}


@pytest.mark.parametrize("pattern", ["2:4", "3:7", "1:8"])
def test_group_patterns_hold_in_every_group(tiny_llama: Path, tmp_path: Path, pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    model = run(tiny_llama, tmp_path / "adapted", recipe(sparsity__pattern=pattern, adapt__mode="none"))
    for block in range(3):
        for linear in model.block(block).values():
            for start in range(0, linear.mask.shape[1], m):
                group = linear.mask[:, start : start + m]
                assert bool((group.sum(dim=1) == min(n, group.shape[1])).all())


@pytest.mark.parametrize(("ramp", "first"), [("cubic", 0.0), ("none", 0.5)])
def test_sliding_windows_wait_for_the_last_step_of_a_ramp(
    tiny_llama: Path, tmp_path: Path, ramp: str, first: float
) -> None:
    chosen = recipe(sparsity__pattern="sliding", schedule__ramp=ramp)
    out, between = tmp_path / "adapted", set()

    def look(done: int, total: int, label: str) -> None:
        state = read_state(out) if out.is_dir() else None
        if state is not None and state.step == 1 and "pruning" in label:
            between.add((state.block_sparsity, label))

    checkpoint, record = source_of(tiny_llama)
    model = compress(checkpoint, record, chosen, out, progress=look)
    assert between == {((first,) * 3, "step 2/2: pruning to 0.500")}
    assert model.state.block_sparsity == (0.5,) * 3
    assert not any(bool(torch.isnan(x.weight).any()) for x in model.block(0).values())


@pytest.mark.parametrize(("n", "m", "unit"), [(4, 8, 1), (6, 16, 2)])
def test_mixed_pattern_differs_between_blocks_and_averages_to_n(
    tiny_llama: Path, tmp_path: Path, n: int, m: int, unit: int
) -> None:
    """Of 16 even numbers are kept: tiles store pairs of slots."""
    chosen = recipe(sparsity__pattern=f"{n}:{m}", sparsity__mixed=True, adapt__mode="none")
    model = run(tiny_llama, tmp_path / "adapted", chosen)
    kept = [n for n in kept_of_blocks(model, m) if n is not None]
    assert sum(kept) == 3 * n
    assert len(set(kept)) > 1 and all(count % unit == 0 for count in kept)


def kept_of_blocks(model: AdaptedModel, m: int) -> list[int | None]:
    """The one N of every M that a block of the tiny model keeps; None for a dense block."""
    result: list[int | None] = []
    for block in range(3):
        masks = [linear.mask for n, linear in model.block(block).items() if n in model.state.masked]
        counts = {int(c) for mask in masks for c in mask.view(len(mask), -1, m).sum(dim=-1).flatten()}
        assert len(counts) <= 1, "one N per block"
        result.append(counts.pop() if counts else None)
    return result


def test_mixed_pattern_keeps_more_in_blocks_of_lower_rate(tiny_llama: Path, tmp_path: Path) -> None:
    """Rates that rise with depth: every block keeps less than the one before."""
    chosen = recipe(
        sparsity__pattern="4:8", sparsity__mixed=True, adapt__mode="none", allocation__method="slope"
    )
    assert kept_of_blocks(run(tiny_llama, tmp_path / "adapted", chosen), 8) == [5, 4, 3]
    wide = recipe(
        sparsity__pattern="4:8",
        sparsity__mixed=True,
        adapt__mode="none",
        allocation__method="slope",
        allocation__delta=[0.25, 0.25, 0.25],
    )
    assert kept_of_blocks(run(tiny_llama, tmp_path / "wide", wide), 8) == [6, 4, 2]


def test_mixed_pattern_counts_only_prunable_blocks(tiny_llama: Path, tmp_path: Path) -> None:
    chosen = recipe(
        sparsity__pattern="4:8",
        sparsity__mixed=True,
        sparsity__exclude=["*.layers.0.*"],
        adapt__mode="none",
        allocation__method="slope",
    )
    assert kept_of_blocks(run(tiny_llama, tmp_path / "adapted", chosen), 8) == [None, 5, 3]


def test_mixed_counts_weigh_blocks_by_their_prunable_weights() -> None:
    """The second block is excluded, the last ones hold twice the weights of the others."""
    pattern = recipe(sparsity__pattern="6:16", sparsity__mixed=True).sparsity
    sizes = np.array([1.0, 0.0, 1.0, 2.0, 2.0]) * 64
    rates = np.array([0.605, 0.9, 0.615, 0.625, 0.635])
    kept = np.array(allocate.kept_per_block(rates, pattern.target, pattern, sizes, [16] * 5))
    counted = sizes > 0
    assert float(np.average(kept[counted], weights=sizes[counted])) == 6
    assert len(set(kept[counted])) > 1 and not (kept[counted] % 2).any()
    assert sorted(kept[counted], reverse=True) == kept[counted].tolist()


def test_a_block_cannot_get_back_what_it_gave_and_others_make_up_for_it() -> None:
    """The ranking turned round between two steps; the mean is met all the same."""
    pattern = recipe(sparsity__pattern="4:8", sparsity__mixed=True).sparsity
    rates, have = np.array([0.49, 0.5, 0.5, 0.51]), [3, 5, 5, 7]
    kept = allocate.kept_per_block(rates, 0.5, pattern, np.full(4, 64.0), have)
    assert all(now <= before for now, before in zip(kept, have, strict=True))
    assert sum(kept) == 16


def test_excluded_linears_stay_dense(tiny_llama: Path, tmp_path: Path) -> None:
    chosen = recipe(sparsity__exclude=["*.v_proj"], adapt__mode="none")
    model = run(tiny_llama, tmp_path / "adapted", chosen)
    dense = Checkpoint.open(tiny_llama)
    for name, linear in model.block(0).items():
        if name.endswith("v_proj"):
            assert name not in model.state.masked
            assert torch.equal(linear.weight, dense.tensor(f"{name}.weight"))
        else:
            assert not bool(linear.mask.all())
    with pytest.raises(InputError, match="leaves no linear"):
        run(tiny_llama, tmp_path / "other", recipe(sparsity__exclude=["*"]))


def test_same_recipe_and_seed_give_equal_bytes_another_seed_does_not(
    tiny_llama: Path, tmp_path: Path
) -> None:
    chosen = recipe(adapt__mode="adapters")
    first, second = (run(tiny_llama, tmp_path / name, chosen) for name in ("a", "b"))
    assert shard_hashes(first.folder, 2) == shard_hashes(second.folder, 2)
    third = run(tiny_llama, tmp_path / "c", recipe(adapt__mode="adapters", seed=1))
    assert shard_hashes(third.folder, 2) != shard_hashes(first.folder, 2)


def test_interrupted_run_resumes_to_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    chosen = recipe(adapt__mode="adapters")
    whole = run(tiny_llama, tmp_path / "whole", chosen)

    def stop(done: int, total: int, label: str) -> None:
        if label.startswith("step 2/2"):
            raise KeyboardInterrupt

    checkpoint, record = source_of(tiny_llama)
    with pytest.raises(KeyboardInterrupt):
        compress(checkpoint, record, chosen, tmp_path / "cut", progress=stop)
    state = read_state(tmp_path / "cut")
    assert state is not None and state.step == 1
    with pytest.raises(InputError, match="step 1 of 2"):
        AdaptedModel.open(tmp_path / "cut")
    labels: list[str] = []
    resumed = compress(
        checkpoint, record, chosen, tmp_path / "cut", progress=lambda d, t, label: labels.append(label)
    )
    assert not any(label.startswith(("step 1/2", "sampling")) for label in labels)
    assert shard_hashes(resumed.folder, 2) == shard_hashes(whole.folder, 2)


def test_runs_that_ask_for_the_same_own_text_share_it(tiny_llama: Path, tmp_path: Path) -> None:
    checkpoint, record = source_of(tiny_llama)
    texts = tmp_path / "texts"
    texts.mkdir()
    labels: list[str] = []

    def sampled(name: str, chosen: Recipe) -> tuple[AdaptedModel, bool]:
        labels.clear()
        model = compress(
            checkpoint,
            record,
            chosen,
            tmp_path / name,
            progress=lambda done, total, label: labels.append(label),
            texts=texts,
        )
        return model, any(label.startswith("sampling") for label in labels)

    alone = run(tiny_llama, tmp_path / "alone", recipe(adapt__mode="none"))
    first, made = sampled("first", recipe(adapt__mode="none"))
    _, again = sampled("second", recipe(adapt__mode="none", sparsity__target=0.4))
    _, other = sampled("third", recipe(adapt__mode="none", calibration__temperature=0.7))
    assert (made, again, other) == (True, False, True)
    assert shard_hashes(first.folder, 2) == shard_hashes(alone.folder, 2)
    for path in texts.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    damaged, made = sampled("fourth", recipe(adapt__mode="none"))
    assert made and shard_hashes(damaged.folder, 2) == shard_hashes(alone.folder, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapt__mode": "adapters", "prune__method": "wanda", "adapt__loss": "ce"},
        {"adapt__mode": "none", "sparsity__pattern": "2:4"},
        {
            "phases": [
                {"train": ["weights", "scales"], "grid": "export", "tokens": 300},
                {"train": ["weights", "norms"], "window": 2, "grid": "export", "tokens": 300},
                {"train": ["norms"], "where": "model", "grid": "export", "tokens": 300},
            ],
        },
    ],
    ids=["adapters", "2:4", "grid"],
)
def test_blocks_opened_one_at_a_time_give_the_bytes_of_a_model_in_memory(
    changes: dict[str, object], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe(**changes)
    opened: list[int] = []
    walking: list[bool] = []
    load = Student.load_block

    def spy(student: Student, block: int) -> None:
        if walking:
            opened.append(sum(users > 0 for users in student._users.values()))
        load(student, block)

    def walk(*arguments: object) -> object:
        walking.append(True)
        results = walk_blocks(*arguments)  # type: ignore[arg-type]
        walking.clear()
        return results

    monkeypatch.setattr(Student, "load_block", spy)
    monkeypatch.setattr(schedule_module, "walk_blocks", walk)
    streamed = run(tiny_llama, tmp_path / "streamed", chosen)
    assert max(opened) == max((p.window for p in chosen.phases if p.where == "blocks"), default=1)
    monkeypatch.undo()

    class Kept(Student):
        def __init__(self, checkpoint: Checkpoint, dense: Decoder) -> None:
            super().__init__(checkpoint, dense)
            self.keep()

    monkeypatch.setattr(schedule_module, "Student", Kept)
    resident = run(tiny_llama, tmp_path / "resident", chosen)
    assert shard_hashes(streamed.folder, 2) == shard_hashes(resident.folder, 2)


def test_norms_learn_through_a_model_that_is_never_in_memory(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block forwards and backwards, to the values that the whole model gives."""
    chosen = recipe(schedule__steps=1, precision="f32", **SMALL_QUICK)
    monkeypatch.setattr(tune_module, "MICRO_TOKENS", 100)  # a batch of eight in four pieces
    checkpoint, record = source_of(tiny_llama)
    most: list[int] = []
    load = Student.load_block

    def spy(student: Student, block: int) -> None:
        most.append(sum(users > 0 for users in student._users.values()))
        load(student, block)

    monkeypatch.setattr(Student, "load_block", spy)
    frugal = compress(checkpoint, record, chosen, tmp_path / "a", progress=no_progress, room=Room(memory=1))
    assert max(most) == 1
    plenty = compress(
        checkpoint, record, chosen, tmp_path / "b", progress=no_progress, room=Room(memory=10**11)
    )
    assert max(most) == 3
    small, large = frugal.rest(), plenty.rest()
    source = {name: checkpoint.tensor(name) for name in large}
    assert len(large) == 7 and all(not torch.equal(large[name], source[name]) for name in large)
    for name, value in large.items():
        assert torch.allclose(small[name], value, rtol=1e-6, atol=1e-7), name
    assert frugal.state.training[-1].losses == pytest.approx(plenty.state.training[-1].losses, rel=1e-5)


def test_another_recipe_starts_afresh(tiny_llama: Path, tmp_path: Path) -> None:
    first = run(tiny_llama, tmp_path / "adapted", recipe(adapt__mode="none"))
    before = shard_hashes(first.folder, 2)
    again = run(tiny_llama, tmp_path / "adapted", recipe(adapt__mode="none", sparsity__target=0.4))
    assert shard_hashes(again.folder, 2) != before
    assert again.state.recipe.sparsity.target == 0.4


@pytest.mark.parametrize("use", ["calibration", "phase"])
def test_another_text_under_the_same_name_starts_afresh(
    tiny_llama: Path, tmp_path: Path, tiny_text: str, use: str
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "adapted"
    text.write_text(tiny_text)
    chosen = recipe(calibration__source=str(text), adapt__mode="none")
    if use == "phase":
        chosen = recipe(phases=[{"where": "model", "data": [{"source": str(text)}]}])
    before = shard_hashes(run(tiny_llama, out, chosen).folder, 2)
    labels: list[str] = []
    checkpoint, record = source_of(tiny_llama)
    compress(checkpoint, record, chosen, out, progress=lambda d, t, label: labels.append(label))
    assert not labels, "the same text: reused as it is"
    text.write_text(tiny_text.swapcase())
    assert shard_hashes(run(tiny_llama, out, chosen).folder, 2) != before
    text.unlink()
    with pytest.raises(InputError, match="does not exist"):
        run(tiny_llama, out, chosen)
    assert read_state(out) is not None, "nothing is deleted for a text that is not there"


def test_reconstruction_lowers_the_block_errors(tiny_llama: Path, tmp_path: Path) -> None:
    plain = run(tiny_llama, tmp_path / "plain", recipe(adapt__mode="none", prune__method="wanda"))
    repaired = run(tiny_llama, tmp_path / "repaired", recipe(prune__method="wanda", adapt__steps=30))
    assert repaired.state.block_error[-1] < 0.8 * plain.state.block_error[-1]


def test_block_stream_equals_the_whole_model(tiny_llama: Path) -> None:
    decoder = Decoder(Checkpoint.open(tiny_llama))
    tokens = torch.arange(60).view(4, 15)
    stream = decoder.stream(tokens, 2)
    for block in range(3):
        stream = decoder.advance(block, stream)
    normed = decoder.model.get_submodule("model.norm")(stream.hidden)
    logits = decoder.model.get_submodule("lm_head")(normed)
    assert torch.allclose(logits, decoder.logits(tokens), atol=1e-5)


def test_batch_size_does_not_depend_on_divisors() -> None:
    assert [batch_size(n) for n in (1, 7, 12, 127)] == [1, 7, 8, 8]


def test_importance_of_identical_blocks_is_equal(tiny_llama: Path, tmp_path: Path) -> None:
    """Blocks that change nothing have identical features, so none is more important."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    decoder = Decoder(Checkpoint.open(copy)).keep()
    for name in decoder.names:
        decoder.linear(name).weight.data.zero_()
    importance = rmi_importance(decoder, torch.arange(60).view(6, 10), beta=1.0)
    assert np.ptp(importance) < 1e-9


def test_importance_is_that_of_the_features_without_their_first_token(tiny_llama: Path) -> None:
    """Against CKA by its definition, of the hidden states that transformers returns."""
    decoder = Decoder(Checkpoint.open(tiny_llama)).keep()
    tokens = torch.randint(0, 300, (7, 12), generator=torch.Generator().manual_seed(0))
    states = decoder.model(input_ids=tokens, output_hidden_states=True).hidden_states[:3]
    flat = [s[:, 1:].flatten(1).double().numpy() for s in states]
    centred = [f - f.mean(axis=0) for f in flat]

    def hsic(i: int, j: int) -> float:
        return float(np.square(centred[i].T @ centred[j]).sum())

    cka = np.array([[hsic(i, j) / np.sqrt(hsic(i, i) * hsic(j, j)) for j in range(3)] for i in range(3)])
    redundancy = cka.sum(axis=1) - 1.0
    expected = np.exp(-2.0 * redundancy / redundancy.sum())
    # Sums of squares of f32 features, in two orders.
    assert np.allclose(rmi_importance(decoder, tokens, beta=2.0), expected, rtol=1e-5)


def test_phases_that_train_weights_compute_blocks_twice_where_memory_is_short(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = {"train": ["weights"], "where": "model", "tokens": 200}
    chosen = recipe(schedule__steps=1, precision="f32", phases=[phase])
    checkpoint, record = source_of(tiny_llama)
    features = Student.features
    seen: list[bool] = []

    def spy(self: Student, tokens: torch.Tensor, precision: str, *, recompute: bool) -> torch.Tensor:
        seen.append(recompute)
        return features(self, tokens, precision, recompute=recompute)

    monkeypatch.setattr(Student, "features", spy)
    shards = []
    for memory in (1, 10**11):
        out = tmp_path / str(memory)
        compress(checkpoint, record, chosen, out, progress=no_progress, room=Room(memory=memory))
        shards.append(shard_hashes(out, 1))
    half = len(seen) // 2
    assert half and seen == [True] * half + [False] * half
    assert shards[0] == shards[1]
