"""What block phases and phases through the whole model share: which parameters train, how far they move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.phases import PhaseRecipe

SCALE_RATE = 0.2
"""Learning rate of a grid's scales against that of its weights; one scale moves many weights."""
NORM_RATE = 0.2
"""The same of norms and biases; one of their numbers acts on a whole channel.

Each moves in proportion to itself: norms keep channels with huge activations small by numbers far below the
others, and a step that suits these would let outliers through, which activations in eight bits cannot hold.
"""


def kept_rms(linear: MaskedLinear) -> float:
    """RMS of the kept weights: the unit of the relative learning rate."""
    kept = linear.mask.sum().clamp_min(1)
    return float((linear.weight.detach().square().sum() / kept).sqrt()) or 1.0


class Trained:
    """The parameters that a phase trains, their learning rates, and hooks that keep pruned weights out."""

    def __init__(
        self,
        linears: Sequence[MaskedLinear],
        phase: PhaseRecipe,
        *,
        rest: Sequence[torch.nn.Parameter] = (),
        factor: float = 1.0,
    ) -> None:
        """`rest` are the norms and biases (see `Decoder.rest`); `factor` multiplies the learning rate."""
        self.linears = tuple(linears)
        self.groups: list[dict[str, object]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._proportional: list[tuple[torch.nn.Parameter, Tensor]] = []
        """Parameters whose numbers move by shares of a step, and these shares."""
        relative = phase.rate != "absolute"
        rate = phase.learning_rate * factor
        for linear in self.linears:
            if not {"weights", "adapters"} & set(phase.train):
                linear.hold_levels()
            if "weights" in phase.train:
                self._add(linear.weight, rate * kept_rms(linear) if relative else rate)
                hook = linear.weight.register_hook(  # type: ignore[no-untyped-call]
                    lambda grad, mask=linear.mask: grad * mask
                )
                self._handles.append(hook)
            if "scales" in phase.train and linear.grid is not None:
                unit = float(linear.scales.detach().abs().mean()) or 1.0
                self._add(linear.scales, SCALE_RATE * rate * unit if relative else SCALE_RATE * rate)
            if "adapters" in phase.train and linear.rank:
                unit = kept_rms(linear) if relative else 1.0
                self._add(linear.lora_a, rate * unit)
                self._add(linear.lora_b, rate * unit)
                linear.dropout = phase.dropout
        for parameter in rest if "norms" in phase.train else ():
            start = parameter.detach().abs()
            unit = float(start.square().mean().sqrt())
            self._add(parameter, NORM_RATE * rate * (unit or 1.0) if relative else NORM_RATE * rate)
            if relative and unit:
                self._proportional.append((parameter, start / unit))

    def _add(self, parameter: torch.nn.Parameter, rate: float) -> None:
        parameter.requires_grad_(True)
        self.groups.append({"params": [parameter], "lr": rate, "base": rate})

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All of them, in a fixed order."""
        return [group["params"][0] for group in self.groups]  # type: ignore[index]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step of the optimizer, clear of what it would do to small numbers of norms."""
        before = [parameter.detach().clone() for parameter, _ in self._proportional]
        optimizer.step()
        for (parameter, share), start in zip(self._proportional, before, strict=True):
            parameter.copy_(start + share * (parameter - start))

    def snapshot(self) -> list[Tensor]:
        """Their values."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Put values of `snapshot` back."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def release(self) -> None:
        """End of training: no gradients, and pruned weights are exactly zero again."""
        for handle in self._handles:
            handle.remove()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for linear in self.linears:
            linear.dropout = 0.0
            linear.free_levels()
            linear.weight.data.masked_fill_(~linear.mask, 0.0)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Let every group learn at `factor` times its own rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor
