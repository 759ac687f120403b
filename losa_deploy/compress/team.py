"""Several processes that compress one model together, as `torchrun` and `accelerate launch` start them.

Each holds a part of the calibration. What the parts decide together (statistics, gradients, errors) is added
up, so that all processes have the same student; linears are pruned by one process each. One process writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor

from losa_deploy import launcher
from losa_deploy.errors import UsageError

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long a process waits for the others: the first prunes and saves while they do."""


@dataclass(frozen=True)
class Team:
    """Which process this is, and how many there are. Sequence i belongs to process i modulo `count`."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def rows(self, tensor: Tensor) -> Tensor:
        """This process's rows of a tensor that holds those of all."""
        return tensor[self.rank :: self.count]

    def part(self, whole: slice) -> slice:
        """Where the rows of `whole`, counted over all processes, are among this process's own."""
        start, stop = (-(-(edge - self.rank) // self.count) for edge in (whole.start, whole.stop))
        return slice(max(0, start), max(0, stop))

    def mine(self, indices: Sequence[int]) -> list[int]:
        """Those indices of rows that belong to this process."""
        return [index for index in indices if index % self.count == self.rank]

    def place(self, index: int) -> int:
        """Where a row of this process is among its own."""
        return index // self.count

    def shares(self, number: int) -> bool:
        """Whether this process does piece `number` of work that is dealt out."""
        return number % self.count == self.rank

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def total(self, number: Tensor) -> Tensor:
        """The sum of a number over the processes."""
        found = number.detach().clone()
        self.add((found,))
        return found

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up gradients; a process whose part of a batch was empty has none."""
        if self.count > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.add((parameter.grad,))

    def agree(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Replace each tensor by that of one process."""
        if self.count > 1:
            for tensor in tensors:
                # Not every back end knows booleans.
                sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().contiguous()
                torch.distributed.broadcast(sent, source)
                tensor.data.copy_(sent)

    def gathered(self, rows: Tensor, count: int) -> Tensor:
        """All `count` rows of which every process has its own."""
        if self.count == 1:
            return rows
        found = rows.new_zeros(count, *rows.shape[1:])
        found[self.rank :: self.count] = rows
        self.add((found,))
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def after_the_first(self, work: Callable[[], T]) -> T:
        """Do work that writes files for all: the first process does it, the others find what it left."""
        found = work() if self.leads else None
        self.wait()
        return cast(T, found) if self.leads else work()


ALONE = Team()


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The processes of the launcher's run, connected: by NCCL for what is on GPUs, otherwise by Gloo."""
    size, rank = launcher.size(), launcher.rank()
    if size == 1:
        yield ALONE
        return
    if rank >= size:
        raise UsageError(f"RANK is {rank}, but WORLD_SIZE {size}.", hint="Start it with torchrun.")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{size} processes cannot share {device.type}.", hint="Use --device cpu or cuda.")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"The {size} processes cannot be connected: {error}.",
            hint="Start them with torchrun or accelerate launch, or unset WORLD_SIZE.",
        ) from None
    try:
        yield Team(rank, size)
    finally:
        torch.distributed.destroy_process_group()
