"""The lossless merge: W' = (W + s·BA) ∘ M in f32, cast once, and the proof that nothing was lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.errors import GateError, InputError
from losa_deploy.manifest import Manifest, MergeProof, TensorRecord, hash_files
from losa_deploy.model import GRID_FILE, GRID_KEY, MASK_FILE, SparseModel, pack_mask
from losa_deploy.sources.checkpoint import GGUF_TOKENIZER_FILE, Checkpoint, copy_side_files, write_weights
from losa_deploy.stage_module import call_as_stage

if TYPE_CHECKING:
    import torch
    from torch import nn

    from losa_deploy.compress.adapted import AdaptedModel
    from losa_deploy.compress.decoder import Decoder
    from losa_deploy.compress.grid import GridKind
    from losa_deploy.compress.masked import AdaptedLinear
    from losa_deploy.progress import Progress

call_as_stage(__name__)

PROOF_WINDOWS = 2
VALUE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass
class _Evidence:
    """What the writer notes about every linear while it streams them to disk."""

    support_equal: bool = True
    culprit: str = ""
    cast_error: float = 0.0
    kept_zeros: int = 0
    pruned: int = 0
    positions: int = 0
    records: list[TensorRecord] = field(default_factory=list)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    grid_equal: bool = True
    grids: dict[str, GridKind] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)


def merge(source: Checkpoint, adapted: AdaptedModel, folder: Path, *, progress: Progress) -> SparseModel:
    """Merge `adapted` (made from `source`) into `folder`, which exists and is empty.

    Writes an ordinary Hugging Face folder plus `masks.safetensors` and `losa.json` with the proof.
    Raises `GateError` (after writing, so that the evidence can be looked at) if the proof fails.
    """
    from safetensors.torch import save_file

    evidence = _Evidence()
    dtype = _target_dtype(adapted)
    write_weights(folder, _merged_tensors(source, adapted, dtype, evidence, progress))
    save_file(dict(sorted(evidence.masks.items())), folder / MASK_FILE)
    (folder / MASK_FILE).chmod(0o644)  # safetensors makes files that only their owner can read
    if evidence.grids:
        _write_grids(evidence, folder)
    copy_side_files(source.folder, folder, [GGUF_TOKENIZER_FILE])
    if dtype is not None:
        _set_config(folder, dtype=str(dtype).removeprefix("torch."))
    if source.config.get("tie_word_embeddings", False) and not source.tied:
        _set_config(folder, tie_word_embeddings=False)
    proof = prove(source, adapted, folder, evidence)
    state = adapted.state
    Manifest(
        kind="merged",
        source=state.source,
        recipe=state.recipe,
        calibration_sha256=state.calibration_sha256,
        sparsity_achieved=evidence.pruned / max(1, evidence.positions),
        block_sparsity=state.block_sparsity,
        block_rank=state.block_rank,
        block_error=state.block_error,
        training=state.training,
        linears=tuple(evidence.records),
        merge_proof=proof,
        files=hash_files(folder),
    ).write(folder)
    if not proof.ok:
        raise GateError(
            f"The merge proof failed: support equal {proof.support_equal}, grid equal {proof.grid_equal}"
            + (f" (first in {evidence.culprit})" if evidence.culprit else "")
            + f", logits differ by {proof.max_abs_logit_difference:.3g}"
            + f" (allowed {proof.logit_tolerance:.3g}).",
            hint="This is a defect of losa-deploy; please report it with losa.json.",
        )
    return SparseModel.open(folder)


def _write_grids(evidence: _Evidence, folder: Path) -> None:
    """`grid.safetensors`: the scales of every linear that is on a grid, and in the header which grid."""
    import json

    from safetensors.torch import save_file

    names = sorted(evidence.grids)
    kinds = {name: [evidence.grids[name].value_type, evidence.grids[name].group_size] for name in names}
    scales = {name: evidence.scales[name].contiguous() for name in names}
    save_file(scales, folder / GRID_FILE, metadata={"format": "pt", GRID_KEY: json.dumps(kinds)})
    (folder / GRID_FILE).chmod(0o644)  # safetensors makes files that only their owner can read


def _target_dtype(adapted: AdaptedModel) -> torch.dtype | None:
    """The dtype to cast to, None for each tensor's own."""
    import torch

    names = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return names.get(adapted.state.recipe.merge.dtype)


def _merged_tensors(
    source: Checkpoint,
    adapted: AdaptedModel,
    dtype: torch.dtype | None,
    evidence: _Evidence,
    progress: Progress,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of `source` in its order of blocks, the linears merged; one block in memory."""
    linears = source.linears
    masked, rest = frozenset(adapted.state.masked), adapted.rest()
    if missing := sorted(set(rest) - set(source.files)):
        raise InputError(
            f"{adapted.folder} trained {missing[0]}, which the source has under another name.",
            hint="Leave `norms` out of `train` for this model.",
        )
    for name in source.files:
        if name.removesuffix(".weight") not in linears:
            tensor = source.tensor(name)
            kept_dtype = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
            yield name, rest.get(name, tensor).to(kept_dtype)
    for block in range(source.block_count):
        for name, linear in adapted.block(block).items():
            kept_dtype = source.tensor(f"{name}.weight").dtype if dtype is None else dtype
            cast = linear.merged().to(kept_dtype)
            _note(evidence, name, linear, cast, masked=name in masked)
            yield f"{name}.weight", cast
        progress(block + 1, source.block_count, "merging")


def _note(evidence: _Evidence, name: str, linear: AdaptedLinear, cast: torch.Tensor, *, masked: bool) -> None:
    """Collect one linear's part of the proof and its manifest record."""
    import torch

    from losa_deploy.compress.grid import rounded

    exact = linear.merged()
    outside = cast[~linear.mask]
    # Bits, not values: a negative zero outside the mask is a position that did not come from M.
    support_equal = not bool(outside.view(_integer_view(cast.dtype)).any())
    if not support_equal and evidence.support_equal:
        evidence.support_equal, evidence.culprit = False, name
    size = float(exact.norm())
    error = float((cast.float() - exact).norm()) / size if size else 0.0
    evidence.cast_error = max(evidence.cast_error, error)
    if linear.grid is not None and linear.scales is not None:
        evidence.grids[name], evidence.scales[name] = linear.grid, linear.scales.half()
        # The trained values, and what they mean once they are cast: both exactly, not nearly.
        same = torch.equal(rounded(exact, linear.scales, linear.grid), exact)
        kept_levels = torch.equal(rounded(cast.float(), linear.scales, linear.grid), exact)
        if not (same and kept_levels) and evidence.grid_equal:
            evidence.grid_equal, evidence.culprit = False, name
    evidence.kept_zeros += int((cast[linear.mask] == 0).sum())
    kept = int(linear.mask.sum())
    if masked:
        evidence.masks[name] = torch.from_numpy(pack_mask(linear.mask.numpy()))
        evidence.pruned += linear.mask.numel() - kept
        evidence.positions += linear.mask.numel()
    stored = cast.contiguous().view(torch.uint8).numpy().data
    value_type = VALUE_TYPES[str(cast.dtype).removeprefix("torch.")]
    evidence.records.append(TensorRecord.of_dense(name, tuple(cast.shape), value_type, kept, stored))


def _integer_view(dtype: torch.dtype) -> torch.dtype:
    import torch

    return torch.int32 if dtype == torch.float32 else torch.int16


def prove(source: Checkpoint, adapted: AdaptedModel, folder: Path, evidence: _Evidence) -> MergeProof:
    """Compare the adapted model (adapter as a separate branch) with the merged one, in logits.

    The bound on the f32 logits is a rounding bound: both models do the same sums in another
    order, so per linear the relative difference is at most ε·√in, and residual blocks add up.
    """
    import torch
    from safetensors.torch import load_file

    from losa_deploy.compress.adapted import CALIBRATION_FILE
    from losa_deploy.compress.decoder import Decoder

    tokens = load_file(adapted.folder / CALIBRATION_FILE)["tokens"][:PROOF_WINDOWS]
    expected = _branch_logits(Decoder(source), adapted, tokens)
    merged = _merged_logits(Decoder(source), adapted, tokens)
    from_disk = Decoder(Checkpoint.open(folder)).logits_by_block(tokens, lambda block: None)
    widest = max(shape[1] for shape in source.linears.values())
    depth = len(source.linears)
    tolerance = float(expected.abs().max()) * torch.finfo(torch.float32).eps * widest**0.5 * depth
    difference = float((merged - expected).abs().max())
    return MergeProof(
        ok=evidence.support_equal and evidence.grid_equal and difference <= tolerance,
        support_equal=evidence.support_equal,
        grid_equal=evidence.grid_equal if evidence.grids else None,
        max_abs_logit_difference=difference,
        logit_tolerance=tolerance,
        cast_logit_difference=float((from_disk - expected).abs().max()),
        cast_error=evidence.cast_error,
        kept_zeros=evidence.kept_zeros,
    )


def _branch_logits(decoder: Decoder, adapted: AdaptedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of base plus adapter branch: x·(W∘M)ᵀ + s·x·((BA)∘M)ᵀ, two matmuls, nothing merged."""
    from torch.nn.functional import linear as product_with

    handles: list[torch.utils.hooks.RemovableHandle] = []

    def add(m: nn.Module, x: tuple[torch.Tensor], y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return y + product_with(x[0], w)

    def branch(linear: AdaptedLinear, module: nn.Linear) -> torch.Tensor:
        if linear.lora_a.shape[0]:
            product = linear.scale * (linear.lora_b @ linear.lora_a) * linear.mask
            handles.append(module.register_forward_hook(partial(add, w=product)))
        return linear.weight * linear.mask

    logits = _logits(decoder, adapted, tokens, branch)
    for handle in handles:
        handle.remove()
    return logits


def _merged_logits(decoder: Decoder, adapted: AdaptedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits with the merged f32 weights, before any cast."""
    return _logits(decoder, adapted, tokens, lambda linear, module: linear.merged())


def _logits(
    decoder: Decoder,
    adapted: AdaptedModel,
    tokens: torch.Tensor,
    weight_of: Callable[[AdaptedLinear, nn.Linear], torch.Tensor],
) -> torch.Tensor:
    """Logits with trained norms and the weights that `weight_of` gives; one block in memory."""
    from losa_deploy.assemble import set_parameter

    rest = adapted.rest()
    inside = f"{decoder.family.blocks}."
    for name in rest:
        if not name.startswith(inside):
            set_parameter(decoder.model, name, rest[name])

    def change(block: int) -> None:
        for name in decoder.block_parameters(block):
            if name in rest:
                set_parameter(decoder.model, name, rest[name])
        for name, linear in adapted.block(block).items():
            module = decoder.linear(name)
            module.weight.data = weight_of(linear, module)

    return decoder.logits_by_block(tokens, change)


def _set_config(folder: Path, **values: str | bool) -> None:
    """Change keys of `config.json`; nothing else in it changes."""
    import json

    path = folder / "config.json"
    config: dict[str, object] = json.loads(path.read_text("utf-8"))
    for key, value in values.items():
        # transformers 4 wrote the type as torch_dtype.
        config["torch_dtype" if key == "dtype" and "torch_dtype" in config else key] = value
    path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
