"""Verification finds every kind of damage, and passes what is whole."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from losa_deploy.assemble import set_parameter
from losa_deploy.interfaces import Exporter, Runtime
from losa_deploy.layouts import LAYOUTS, VALUE_TYPES
from losa_deploy.layouts.base import PackOptions
from losa_deploy.manifest import TensorRecord, hash_files
from losa_deploy.model import MASK_FILE, SparseModel, pack_mask, unpack_mask
from losa_deploy.recipe import load_recipe
from losa_deploy.runtimes.reference import ReferenceRuntime, ReferenceSession
from losa_deploy.verify.check import Parity, verify_export, verify_merged
from losa_deploy.verify.stored import check_decoded, check_pattern

LINEAR = "model.layers.1.mlp.down_proj"
Weights = Mapping[str, NDArray[np.float32]]
Check = Callable[..., Parity]


def record(name: str, mask: NDArray[np.bool_], value_type: str = "f32") -> TensorRecord:
    size = mask.size * 4
    return TensorRecord(
        name=name,
        shape=mask.shape,
        layout="dense",
        value_type=value_type,
        nnz=int(mask.sum()),
        bytes=size,
        bits_per_weight=32.0,
        sha256="0" * 64,
    )


@pytest.fixture
def merged(merged_half: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(merged_half, tmp_path / "merged"))


def rehash(folder: Path, **changes: object) -> None:
    """Make the hashes right again, so that only deeper checks can find the damage."""
    document = json.loads((folder / "losa.json").read_text())
    document |= {"files": hash_files(folder), **changes}
    (folder / "losa.json").write_text(json.dumps(document))


def change_weight(folder: Path, linear: str, change: Callable[[torch.Tensor], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[f"{linear}.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_mask(folder: Path, linear: str, change: Callable[[NDArray[np.bool_]], None]) -> None:
    masks = load_file(folder / MASK_FILE)
    shape = SparseModel.open(folder).linears[linear]
    mask = unpack_mask(masks[linear].numpy(), shape)
    change(mask)
    masks[linear] = torch.from_numpy(pack_mask(mask))
    save_file(masks, folder / MASK_FILE)


def reasons(folder: Path) -> str:
    check = verify_merged(SparseModel.open(folder))
    assert check.ok == (not check.reasons)
    return "\n".join(check.reasons)


def first(mask: NDArray[np.bool_], value: bool) -> tuple[int, int]:
    row, column = np.argwhere(mask == value)[0]
    return int(row), int(column)


def test_a_whole_folder_passes_with_its_numbers(merged_half: Path) -> None:
    check = verify_merged(SparseModel.open(merged_half))
    assert check.ok, check.reasons
    assert (check.linears, check.sparsity) == (21, 0.5)
    assert check.kept * 2 == check.positions


def test_a_changed_byte_is_found_by_its_hash(merged: Path) -> None:
    path = merged / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "model.safetensors: found sha256" in reasons(merged)


def test_missing_and_unlisted_files_are_found(merged: Path) -> None:
    (merged / "tokenizer.json").unlink()
    shutil.copyfile(merged / MASK_FILE, merged / "extra.safetensors")
    found = reasons(merged)
    assert "tokenizer.json: file missing" in found
    assert "tokenizer: found none of" in found
    assert "extra.safetensors: found a weight file that losa.json does not list" in found


def test_a_weight_outside_the_mask_is_found_even_if_it_is_a_negative_zero(merged: Path) -> None:
    row, column = first(SparseModel.open(merged).mask(LINEAR), False)

    def damage(weight: torch.Tensor) -> None:
        weight[row, column] = -0.0

    change_weight(merged, LINEAR, damage)
    rehash(merged)
    assert reasons(merged) == (
        f"{LINEAR}: found 1 non-zero weights outside the mask (first at [{row}, {column}]: -0), "
        "expected zero bits"
    )


def test_a_zero_inside_the_mask_is_legal(merged: Path) -> None:
    row, column = first(SparseModel.open(merged).mask(LINEAR), True)

    def zero(weight: torch.Tensor) -> None:
        weight[row, column] = 0.0

    change_weight(merged, LINEAR, zero)
    rehash(merged)
    assert reasons(merged) == ""


def test_a_cleared_mask_bit_is_found(merged: Path) -> None:
    row, column = first(SparseModel.open(merged).mask(LINEAR), True)

    def clear(mask: NDArray[np.bool_]) -> None:
        mask[row, column] = False

    change_mask(merged, LINEAR, clear)
    rehash(merged)
    found = reasons(merged)
    assert f"{LINEAR}: found 1 non-zero weights outside the mask" in found
    assert f"{LINEAR}: found nnz 6144 in losa.json, expected 6143" in found


def test_a_set_mask_bit_breaks_its_group(merged: Path) -> None:
    row, column = first(SparseModel.open(merged).mask(LINEAR), False)

    def add(mask: NDArray[np.bool_]) -> None:
        mask[row, column] = True

    change_mask(merged, LINEAR, add)
    rehash(merged)
    found = reasons(merged)
    assert (
        f"{LINEAR}: found 1 groups with more than 16 of 32 kept (first in row {row} at column 0: 17)" in found
    )
    assert "losa.json: found sparsity 0.500000" in found


def test_a_nan_is_found_by_name(merged: Path) -> None:
    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    rehash(merged)
    assert reasons(merged) == "model.norm.weight: found 1 values that are NaN or infinite, expected none"


def test_a_linear_without_its_mask_is_found_unless_excluded(merged: Path) -> None:
    masks = load_file(merged / MASK_FILE)
    del masks[LINEAR]
    save_file(masks, merged / MASK_FILE)
    rehash(merged)
    assert f"{LINEAR}: found no mask, expected one" in reasons(merged)


def test_the_last_partial_group_may_keep_at_most_n() -> None:
    mask = np.array([[1, 1, 0, 0, 1, 1]], np.bool_)
    assert check_pattern("x", mask, (2, 4)) == []
    assert "1 groups with more than 1 of 4" in check_pattern("x", mask[:, 2:], (1, 4))[0]
    assert "first in row 0 at column 4: 2" in check_pattern("x", mask & (np.arange(6) != 0), (1, 4))[0]


@pytest.mark.parametrize("scale_type", ["f32", "f16"])
@pytest.mark.parametrize("value_type", ["f32", "f16", "i8", "i4"])
def test_the_error_bound_holds_for_the_layouts_and_is_not_slack(
    value_type: str, scale_type: Literal["f32", "f16"]
) -> None:
    rng = np.random.default_rng(0)
    magnitudes = rng.choice([1e-8, 1e-6, 1e-4, 1e-2, 1.0, 100.0], size=(60, 1))
    weight = (rng.normal(size=(60, 172)) * magnitudes).astype(np.float32)
    mask = rng.random(weight.shape) < 0.5
    weight *= mask
    options = PackOptions(value_type=value_type, group_size=32, scale_type=scale_type)
    layout = LAYOUTS["bitmask"]
    decoded = layout.unpack(layout.pack(weight, mask, options)).weight
    findings, error = check_decoded(record("x", mask, value_type), decoded, weight, mask, 32)
    assert findings == []
    bound = VALUE_TYPES[value_type].error_bound(weight, 32)
    assert error == np.abs(decoded - weight).max() <= bound.max()
    large = np.abs(weight) > 1e-3
    if value_type != "f32":
        assert (np.abs(decoded - weight)[large] > 0.4 * bound[large]).any()


def test_a_decoded_weight_one_step_off_or_outside_the_mask_is_found() -> None:
    weight = np.array([[1.27, 0.5, 0.0]], np.float32)
    mask = np.array([[True, True, False]])
    wrong = np.array([[1.27, 0.51, 0.0]], np.float32)
    found, error = check_decoded(record("x", mask, "i8"), wrong, weight, mask, 128)
    assert "x: found 1 weights further off than i8 rounds (first at [0, 1]: 0.51, expected 0.5)" in found
    assert error == pytest.approx(0.01, rel=1e-5)
    outside = np.array([[1.27, 0.5, 1e-9]], np.float32)
    assert "outside the mask" in check_decoded(record("x", mask, "i8"), outside, weight, mask, 128)[0][0]
    assert "decoder returned nothing" in check_decoded(record("x", mask), None, weight, mask, 128)[0][0]
    assert "found shape (1, 2)" in check_decoded(record("x", mask), wrong[:, :2], weight, mask, 128)[0][0]


class StaleRuntime(ReferenceRuntime):
    """A runtime that reads the artifact wrongly: one linear of it is taken from elsewhere."""

    def __init__(self, replacement: Weights) -> None:
        self.replacement = replacement

    def open(self, folder: Path, *, threads: int) -> ReferenceSession:
        session = super().open(folder, threads=threads)
        for name, weight in self.replacement.items():
            set_parameter(session.model, f"{name}.weight", torch.from_numpy(weight))
        return session


@pytest.fixture
def parity(merged_half: Path, folder_exporter: Exporter) -> Check:
    """Verify a folder against `merged_half`, in the reference runtime or the one given."""

    def run(exported: Path, runtime: Runtime | None = None) -> Parity:
        model, recipe = SparseModel.open(merged_half), load_recipe().verify
        return verify_export(
            exported, model, folder_exporter, runtime or ReferenceRuntime(), recipe, threads=1
        )

    return run


@pytest.fixture
def exported(exported_half: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported_half, tmp_path / "exported"))


def test_an_equal_model_has_perfect_parity(exported: Path, parity: Check) -> None:
    found = parity(exported)
    assert found.ok, found.reasons
    assert found.largest_weight_error == 0.0
    assert found.max_abs_logit_difference is not None and found.decoded_logit_tolerance is not None
    assert found.max_abs_logit_difference <= found.decoded_logit_tolerance
    assert found.mean_kl == pytest.approx(0.0, abs=1e-9)
    assert found.greedy_tokens_equal and found.decoded_tokens_equal
    assert (found.same_top_rate, found.prompts, found.tokens) == (1.0, 3, 16)
    assert found.positions > 128


def test_a_wrong_weight_in_the_artifact_is_named(exported: Path, merged_half: Path, parity: Check) -> None:
    row, column = first(SparseModel.open(merged_half).mask(LINEAR), True)

    def nudge(weight: torch.Tensor) -> None:
        weight[row, column] *= 1.0001

    change_weight(exported, LINEAR, nudge)
    rehash(exported)
    found = parity(exported)
    assert not found.ok
    assert (
        f"{LINEAR}: found 1 weights further off than f32 rounds (first at [{row}, {column}]"
        in found.reasons[0]
    )


def test_a_runtime_reading_a_weight_wrongly_fails(exported: Path, merged_half: Path, parity: Check) -> None:
    wrong = SparseModel.open(merged_half).weight(LINEAR).copy()
    wrong[0] = np.roll(wrong[0], 1)
    found = parity(exported, StaleRuntime({LINEAR: wrong}))
    assert not found.ok
    text = "\n".join(found.reasons)
    assert "from the decoded weights, expected at most" in text
    assert found.decoded_logit_difference is not None and found.decoded_logit_tolerance is not None
    assert found.decoded_logit_difference > 10 * found.decoded_logit_tolerance


def test_damaged_files_stop_before_anything_is_opened(exported: Path, parity: Check) -> None:
    with (exported / "model.safetensors").open("r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\x7f")
    found = parity(exported)
    assert not found.ok and found.max_abs_logit_difference is None
    assert "model.safetensors: found sha256" in found.reasons[0]


def test_a_merged_folder_is_not_an_exported_one(merged_half: Path, parity: Check) -> None:
    assert "found kind 'merged', expected 'exported'" in parity(merged_half).reasons[0]


def test_a_packed_embedding_that_the_decoder_leaves_out_is_named(exported: Path, parity: Check) -> None:
    table = record("model.embed_tokens", np.ones((300, 64), np.bool_), "i8").model_dump(mode="json")
    rehash(exported, other_tensors=[table])
    assert parity(exported).reasons == (
        "model.embed_tokens: the artifact's decoder returned nothing, expected a weight (300, 64)",
    )


class Rounding(StaleRuntime):
    """A runtime with kernels, which are wrong by a replaced weight; exactly, it is what it must be."""

    def exact(self) -> ReferenceRuntime:
        return ReferenceRuntime()


def test_kernels_are_judged_without_the_exact_runtime_where_that_does_not_fit(
    exported: Path, merged_half: Path, folder_exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, recipe = SparseModel.open(merged_half), load_recipe().verify
    weight = model.weight(LINEAR)

    def check(change: float, memory: int) -> Parity:
        runtime = Rounding({LINEAR: weight * np.float32(change)})
        return verify_export(exported, model, folder_exporter, runtime, recipe, threads=1, memory=memory)

    assert check(1.0, 10**10).decoded_logit_difference is not None
    small = check(1.0, 1000)
    assert small.ok and small.decoded_logit_difference is small.decoded_tokens_equal is None
    assert small.kernel_kl == pytest.approx(0.0, abs=1e-9)
    parameters = sum(weight.size for weight in map(model.checkpoint.array, model.checkpoint.files))
    assert check(1.0, 5 * parameters).decoded_logit_difference is not None
    monkeypatch.setattr(ReferenceRuntime, "loading_bytes", 6, raising=False)
    assert check(1.0, 5 * parameters).decoded_logit_difference is None, "this one says that it needs more"
    wrong = check(-1.0, 1000)
    assert not wrong.ok and any("kernels: found a mean divergence" in reason for reason in wrong.reasons)
