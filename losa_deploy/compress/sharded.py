"""Phases through a model whose weights no process can hold: the processes share out every parameter.

Each has some rows of each parameter of the blocks, with their gradient and moments; a block's are put
together while it computes (FSDP: Zhao et al. 2023, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from losa_deploy.compress import adapted
from losa_deploy.compress.masked import AdaptedLinear
from losa_deploy.compress.partial import Partial
from losa_deploy.compress.student import StoredBlock, Student
from losa_deploy.compress.team import Team
from losa_deploy.compress.walk import REST, settle_grid
from losa_deploy.manifest import GridRecord
from losa_deploy.phases import PhaseRecipe


def shared_out(student: Student, phase: PhaseRecipe, team: Team) -> Student:
    """A second student like `student`, on the phase's grid, of which each process holds its rows.

    One whole block is in memory at a time. It cannot be opened or closed; it goes with its last reference.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    result = Student(student.checkpoint, student)
    result.stored = student.stored
    result.restore_rest({name: value.detach().clone() for name, value in student.rest(None).items()})
    mesh = init_device_mesh(student.device.type, (team.count,))
    for block, module in enumerate(result.blocks):
        result.keep(block)
        linears = [result.masked(name) for name in result.block_linears(block)]
        settle_grid(linears, phase, [None] * len(linears))
        for linear in linears:
            linear.mask, linear.shared_out = _rows(linear.mask, team), True
        empty = {value for value in module.parameters() if not value.numel()}
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=empty)
    return result


def _rows(tensor: Tensor, team: Team) -> Tensor:
    """This process's rows as FSDP deals them out."""
    parts = torch.chunk(tensor, team.count)
    return parts[team.rank].clone() if team.rank < len(parts) else tensor[:0].clone()


def collect(
    trained: Student, student: Student, partial: Partial, team: Team, number: int, losses: Sequence[float]
) -> None:
    """Save what phase `number` made of each block, from where `student` reads it from now on."""
    for block in range(len(student.blocks)):
        tensors, record = _whole_block(trained, student, block)
        if team.leads:
            partial.save_phase(number, block, tensors, record)
    student.restore_rest({name: value.detach() for name, value in trained.rest(None).items()})
    if team.leads:
        last = {name: value.detach().cpu() for name, value in student.rest(None).items()}
        partial.save_phase(number, None, last, {"losses": list(losses)})
    team.wait()
    take_up(student, partial, number)


def _whole_block(
    trained: Student, student: Student, block: int
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A block put together from all processes' rows and settled, and the record beside it."""
    tensors: dict[str, Tensor] = {}
    names = student.block_linears(block)
    with student.open(block):
        for name in names:
            found, linear = trained.masked(name), student.masked(name)
            scales = _full(found.scales) if found.grid is not None else None
            linear.take(
                AdaptedLinear(
                    _full(found.weight), linear.mask, linear.lora_a.data, linear.lora_b.data, linear.scale,
                    found.grid, scales,
                ),
                student.device,
            )  # fmt: skip
            linear.settle()
        tensors |= adapted.block_tensors(student, block)
        for name, value in trained.rest(block).items():
            tensors[f"{REST}{name}"] = _full(value).cpu()
        grids = adapted.grid_records(student, names)
    return tensors, {"grids": {name: grid.model_dump() for name, grid in grids.items()}}


def _full(parameter: Tensor) -> Tensor:
    whole = getattr(parameter.detach(), "full_tensor", None)
    found: Tensor = parameter.detach() if whole is None else whole()
    return found


def take_up(student: Student, partial: Partial, number: int) -> tuple[float, ...] | None:
    """Let `student` be what phase `number` made of it, if that was saved whole; the phase's losses."""
    record = partial.phase(number)
    if record is None:
        return None
    student.restore_rest(adapted.read_tensors(partial.phase_file(number, None)))
    student.stored = lambda block: _stored(student, partial, number, block)
    for block in range(len(student.blocks)):
        with student.open(block):  # it learns which grid it is on
            pass
    losses = record["losses"]
    assert isinstance(losses, list)
    return tuple(losses)


def _stored(student: Student, partial: Partial, number: int, block: int) -> StoredBlock:
    tensors = adapted.read_tensors(partial.phase_file(number, block))
    grids = {name: GridRecord.model_validate(grid) for name, grid in _grids(partial, number, block).items()}
    own = {name: value for name, value in tensors.items() if not name.startswith(REST)}
    rest = {name.removeprefix(REST): value for name, value in tensors.items() if name.startswith(REST)}
    return StoredBlock(adapted.linears_of(own, {}, grids), rest)


def _grids(partial: Partial, number: int, block: int) -> Mapping[str, object]:
    record = partial.phase_block(number, block)
    grids = record["grids"]
    assert isinstance(grids, dict)
    return grids
