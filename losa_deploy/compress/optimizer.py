"""AdamW for phases through the model: torch's, or with moments in eight bits on CUDA devices.

The latter is that of bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861), which is not imported elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from losa_deploy.compress.train import local
from losa_deploy.errors import UsageError
from losa_deploy.phases import OptimizerName
from losa_deploy.recipe import Recipe

PACKAGE = "bitsandbytes"
Kind = Literal["adamw", "adamw8bit"]


def optimizer_on(name: OptimizerName, device: torch.device) -> Kind:
    """What a phase's `optimizer` means on a device; `UsageError` says what `adamw8bit` lacks there."""
    fits, there = device.type == "cuda", find_spec(PACKAGE) is not None
    if name == "auto":
        return "adamw8bit" if fits and there else "adamw"
    if name == "adamw8bit" and not fits:
        raise UsageError(
            f"The optimizer adamw8bit needs a CUDA device; this run is on {device.type}.",
            hint="Use --device cuda, or optimizer: auto in the phases of the recipe.",
        )
    if name == "adamw8bit" and not there:
        raise UsageError(
            f"The optimizer adamw8bit needs the package {PACKAGE}, which is not installed.",
            hint="Run: pip install 'losa-deploy[cuda]', or use optimizer: auto.",
        )
    return name


def settled(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with the optimizer of every phase decided; raises `UsageError` as `optimizer_on`."""
    phases = tuple(
        phase.model_copy(update={"optimizer": optimizer_on(phase.optimizer, device)})
        if phase.where == "model"
        else phase
        for phase in recipe.phases
    )
    return recipe.model_copy(update={"phases": phases})


def new_optimizer(
    kind: Kind, groups: Sequence[dict[str, object]], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW of one kind for parameter groups as `Trained` makes them."""
    if kind == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    from bitsandbytes.optim import AdamW8bit

    result: torch.optim.Optimizer = AdamW8bit(groups, weight_decay=weight_decay)
    return result


def saved_kind(tensors: Mapping[str, Tensor]) -> Kind:
    """Which optimizer left these `moments`."""
    return "adamw" if any(name.endswith(".exp_avg") for name in tensors) else "adamw8bit"


def moments(optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter]) -> dict[str, Tensor]:
    """What the optimizer knows besides the number of its steps, on the CPU, by number of the parameter."""
    return {
        f"{index}.{key}": local(value).cpu()
        for index, parameter in enumerate(parameters)
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and key != "step"
    }


@torch.no_grad()
def restore_moments(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    tensors: Mapping[str, Tensor],
    steps: int,
) -> None:
    """Put what `moments` gave after so many steps into a new optimizer of the same kind."""
    plain = saved_kind(tensors) == "adamw"
    for index, parameter in enumerate(parameters):
        prefix = f"{index}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        own.pop("value", None)
        if not own:
            continue
        if not plain:
            placed = {key: value.to(parameter.device) for key, value in own.items()}
            optimizer.state[parameter] = {"step": steps, **placed}
            continue
        state = {key: torch.zeros_like(parameter) for key in own}
        for key, value in state.items():
            local(value).copy_(own[key])
        step = torch.tensor(float(steps), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **state}
