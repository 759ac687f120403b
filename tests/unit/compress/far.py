"""A device `far` whose numbers lie in the memory of the CPU, and a compression on it.

torch sees tensors of another device: an operation that mixes them with those of the CPU fails, as does
NumPy. Run as `python far.py SOURCE RECIPE FOLDER` in a process of its own, because a backend stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map, tree_map_only

NAME = "far"
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Far(torch.Tensor):
    """A tensor on the device."""

    near: torch.Tensor

    @staticmethod
    def __new__(cls: type[Far], near: torch.Tensor) -> Far:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, near: torch.Tensor) -> None:
        self.near = near

    @classmethod
    def __torch_dispatch__(
        cls: type[Far],
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        return compute(func, *args, **(kwargs or {}))


def compute(func: Callable[..., object], *args: object, **kwargs: object) -> object:
    """An operation on the CPU whose results are where its tensors, or its `device`, are."""
    places: list[bool] = []
    tree_map_only(torch.Tensor, lambda t: places.append(isinstance(t, Far) or not t.dim()), (args, kwargs))
    here = [place for place in places if not place]
    far = any(isinstance(t, Far) for t in _tensors((args, kwargs)))
    if far and here and func not in MOVES:
        raise RuntimeError(f"{func}: tensors on two devices")
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    result = func(*near_args, **near_kwargs)
    name = func._schema.name  # type: ignore[attr-defined]
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], torch.Tensor):
        return args[0]
    device = kwargs.get("device")
    if device is not None:
        far = torch.device(device).type == NAME  # type: ignore[arg-type]
    return tree_map_only(torch.Tensor, Far, result) if far else result


def _tensors(nested: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, nested)
    return found


def _near(value: object) -> object:
    if isinstance(value, Far):
        return value.near
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


class _Module:
    """What torch asks of a backend."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Its random numbers are those of the CPU."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def install() -> torch.device:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    globals()["_library"] = library  # it ends with its last reference
    torch.tensor = _tensor
    return torch.device(NAME, 0)


_on_cpu = torch.tensor


def _tensor(data: object, *, device: torch.device | None = None, **others: object) -> torch.Tensor:
    """`torch.tensor`, which does not ask Python backends."""
    made: torch.Tensor = _on_cpu(data, **others)  # type: ignore[arg-type]
    return made if device is None else made.to(device)


def main(source: Path, recipe: Path, folder: Path) -> None:
    from losa_deploy.compress import schedule
    from losa_deploy.compress.device import Room
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.progress import no_progress
    from losa_deploy.recipe import Recipe
    from losa_deploy.sources.checkpoint import Checkpoint

    torch.set_num_threads(1)
    room = Room(install(), 10**11)
    chosen = Recipe.model_validate_json(recipe.read_text("utf-8"))
    record = SourceRecord(id="someone/tiny")
    # Beside a Python backend transformers loads wrong weights on the CPU, which this would compare with.
    schedule.check_unpruned = lambda *_: None
    schedule.compress(Checkpoint.open(source), record, chosen, folder, progress=no_progress, room=room)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
