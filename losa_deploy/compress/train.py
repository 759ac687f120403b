"""What block phases and phases through the whole model share: which parameters train, how far they move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from losa_deploy.compress.masked import MaskedLinear
from losa_deploy.compress.team import ALONE, Team
from losa_deploy.phases import PhaseRecipe

SCALE_RATE = 0.2
"""Learning rate of a grid's scales against that of its weights; one scale moves many weights."""
NORM_RATE = 0.2
"""The same of norms and biases; one of their numbers acts on a whole channel.

Each moves in proportion to itself: norms keep channels with huge activations small by numbers far below the
others, and a step that suits these would let outliers through, which activations in eight bits cannot hold.
"""


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that processes share out (see `sharded`), or all of it."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def kept_rms(linear: MaskedLinear, team: Team = ALONE) -> float:
    """RMS of the kept weights: the unit of the relative learning rate. Each of a team has some rows."""
    kept = team.total(linear.mask.sum()).clamp_min(1)
    return float((team.total(local(linear.weight.detach()).square().sum()) / kept).sqrt()) or 1.0


def _mean(tensor: Tensor, team: Team) -> Tensor:
    own = local(tensor)
    if team.count == 1:
        return own.mean()
    return team.total(own.sum()) / team.total(own.new_tensor(float(own.numel())))


class Trained:
    """The parameters that a phase trains and their learning rates; pruned weights stay out."""

    def __init__(
        self,
        linears: Sequence[MaskedLinear],
        phase: PhaseRecipe,
        *,
        rest: Sequence[torch.nn.Parameter] = (),
        factor: float = 1.0,
        team: Team = ALONE,
    ) -> None:
        """`rest` are the norms and biases (see `Decoder.rest`); `factor` multiplies the learning rate.

        With a team each process has some rows of every parameter, see `sharded`.
        """
        self.linears, self.team = tuple(linears), team
        self.groups: list[dict[str, object]] = []
        self._proportional: list[tuple[torch.nn.Parameter, Tensor]] = []
        """Parameters whose numbers move by shares of a step, and these shares."""
        relative = phase.rate != "absolute"
        rate = phase.learning_rate * factor
        for linear in self.linears:
            if not {"weights", "adapters"} & set(phase.train):
                linear.hold_levels()
            if "weights" in phase.train:
                self._add(linear.weight, rate * kept_rms(linear, team) if relative else rate)
            if "scales" in phase.train and linear.grid is not None:
                unit = float(_mean(linear.scales.detach().abs(), team)) or 1.0
                self._add(linear.scales, SCALE_RATE * rate * unit if relative else SCALE_RATE * rate)
            if "adapters" in phase.train and linear.rank:
                unit = kept_rms(linear, team) if relative else 1.0
                self._add(linear.lora_a, rate * unit)
                self._add(linear.lora_b, rate * unit)
                linear.dropout = phase.dropout
        for parameter in rest if "norms" in phase.train else ():
            start = parameter.detach().abs()
            unit = float(_mean(start.square(), team).sqrt())
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
    def clip(self, limit: float) -> None:
        """Take pruned weights out of the gradient, and shorten it to `limit`."""
        for linear in self.linears:
            if linear.weight.grad is not None:
                local(linear.weight.grad).mul_(linear.mask)
        if self.team.count == 1:
            torch.nn.utils.clip_grad_norm_(self.parameters, limit)
            return
        found = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        squares = [local(grad).square().sum() for grad in found]
        whole = [grad is local(grad) for grad in found]
        own = sum((s for s, all_here in zip(squares, whole, strict=True) if not all_here), torch.zeros(()))
        rest = sum((s for s, all_here in zip(squares, whole, strict=True) if all_here), torch.zeros(()))
        norm = (self.team.total(own.to(squares[0].device)) + rest.to(squares[0].device)).sqrt()
        for grad in found:
            local(grad).mul_((limit / (norm + 1e-6)).clamp_max(1.0))

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
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for linear in self.linears:
            linear.dropout = 0.0
            linear.free_levels()
            local(linear.weight.detach()).masked_fill_(~linear.mask, 0.0)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Let every group learn at `factor` times its own rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor
