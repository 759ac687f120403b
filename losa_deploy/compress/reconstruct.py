"""Block-wise reconstruction: tune the kept weights of one block to match the dense block's output.

No backward pass leaves the block, so memory is one block and minutes on a CPU suffice
(EBFT, arXiv 2402.12419).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_deploy.compress.decoder import Decoder, Stream
from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.recipe import AdaptRecipe


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """‖output - target‖² / ‖target‖² without each sequence's first token.

    The first token's hidden state is an attention sink hundreds of times larger than the rest;
    with it the loss would be about nothing else.
    """
    return (output - target)[:, 1:].square().sum() / target[:, 1:].square().sum().clamp_min(1e-30)


def kept_rms(linear: MaskedLinear) -> float:
    """RMS of the kept weights: the unit of the relative learning rate."""
    kept = linear.mask.sum().clamp_min(1)
    return float((linear.weight.detach().square().sum() / kept).sqrt()) or 1.0


def learning_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over `warmup` of the steps, then linear decay to 0; `step` counts from 0."""
    warm = max(1, round(warmup * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def freeze_pruned(linears: Sequence[MaskedLinear]) -> list[torch.utils.hooks.RemovableHandle]:
    """Let the kept weights of `linears` train; gradients of pruned ones are zero from the start."""
    handles = []
    for linear in linears:
        linear.weight.requires_grad_(True)
        hook = linear.weight.register_hook(  # type: ignore[no-untyped-call]
            lambda grad, mask=linear.mask: grad * mask
        )
        handles.append(hook)
    return handles


def release(linears: Sequence[MaskedLinear], handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
    """End of training: no gradients, and pruned weights are exactly zero again."""
    for handle in handles:
        handle.remove()
    for linear in linears:
        linear.weight.requires_grad_(False)
        linear.weight.grad = None
        linear.weight.masked_fill_(~linear.mask, 0.0)


def held_out_count(batches: int) -> int:
    """Batches kept from training to judge it: a tenth, at least one when there are two or more."""
    return max(1, batches // 10) if batches > 1 else 0


def reconstruct_block(
    student: Decoder,
    block: int,
    stream: Stream,
    target: Tensor,
    recipe: AdaptRecipe,
    draw: torch.Generator,
) -> tuple[float, float]:
    """Train the kept weights of `block` so that its output on `stream` matches `target`.

    `target` [samples, tokens, hidden] is the dense model's output of the block. Returns the
    held-out relative error before and after; a block that got worse is put back as it was.
    """
    linears = [student.masked(name) for name in student.block_linears(block)]
    parts = list(stream.batches())
    held = parts[len(parts) - held_out_count(len(parts)) :]
    train = parts[: len(parts) - len(held)] or parts
    held = held or parts
    before = _held_out_error(student, block, stream, target, held)
    saved = [linear.weight.detach().clone() for linear in linears]
    groups = [{"params": [m.weight], "lr": recipe.learning_rate * kept_rms(m)} for m in linears]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_factor(step, recipe.steps, recipe.warmup)
    )
    handles = freeze_pruned(linears)
    for number in range(recipe.steps):
        if number % len(train) == 0:
            order = torch.randperm(len(train), generator=draw).tolist()
        part = train[order[number % len(train)]]
        output = student.run_block(block, stream.hidden[part], stream.arguments[block])
        loss = relative_error(output, target[part])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    release(linears, handles)
    after = _held_out_error(student, block, stream, target, held)
    if not after <= before:
        with torch.no_grad():
            for linear, weight in zip(linears, saved, strict=True):
                linear.weight.copy_(weight)
        after = before
    return before, after


@torch.no_grad()
def _held_out_error(
    student: Decoder, block: int, stream: Stream, target: Tensor, parts: Sequence[slice]
) -> float:
    errors = [
        relative_error(student.run_block(block, stream.hidden[p], stream.arguments[block]), target[p])
        for p in parts
    ]
    return float(torch.stack(errors).mean())
