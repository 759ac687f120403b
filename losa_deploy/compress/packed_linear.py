"""Linears in eight bits, multiplied by the kernels of the runtimes: they let a model write, not learn."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from losa_deploy import _native
from losa_deploy.compress.decoder import Decoder
from losa_deploy.layouts import LAYOUTS, PackOptions
from losa_deploy.layouts.blob import to_blob

STORED = PackOptions("i8")
"""One scale per row."""
Opened = Callable[[], _native.Tensor]


class PackedLinear(nn.Module):
    """y = x Wᵀ + b of a packed W [out, in], for x [..., in] f32 on the CPU, without gradients.

    Any number of threads may be in it at the same time.
    """

    def __init__(self, weight: Opened, rows: int, bias: nn.Parameter | None, threads: int) -> None:
        super().__init__()
        self._weight, self._rows, self._threads = weight, rows, threads
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).numpy()
        product = torch.from_numpy(self._weight().matmul(flat, threads=self._threads))
        result = product.view(*x.shape[:-1], self._rows)
        return result if self.bias is None else result.add_(self.bias)


@contextmanager
def packed_linears(dense: Decoder, in_memory: bool, folder: Path | None, threads: int) -> Iterator[None]:
    """Give all blocks and the head of `dense` packed linears, for good, and open the blocks inside.

    Each block is read once. Unless `in_memory`, the packed weights lie in a nameless file in `folder` (None:
    that of temporary files), and each is mapped only while it is multiplied. `threads` multiply together.
    """
    with ExitStack() as stack:
        file: IO[bytes] | None = None
        if not in_memory:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
        for block in range(len(dense.blocks)):
            with dense.open(block):
                for name in dense.block_linears(block):
                    _replace(dense.model, name, dense.linear(name), file, threads)
        head = next(name for name, module in dense.model.named_modules() if module is dense.head)
        _replace(dense.model, head, dense.head, file, threads)
        with dense.open(*range(len(dense.blocks))):
            yield


def _replace(model: nn.Module, name: str, linear: nn.Linear, file: IO[bytes] | None, threads: int) -> None:
    weight = linear.weight.numpy()
    every = np.broadcast_to(np.True_, weight.shape)
    blob = to_blob(LAYOUTS["dense"].pack(weight, every, STORED))
    module = PackedLinear(_opened(blob, file), linear.out_features, linear.bias, threads)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _opened(blob: bytes, file: IO[bytes] | None) -> Opened:
    if file is None:
        tensor = _native.Tensor(np.frombuffer(blob, np.uint8))
        return lambda: tensor
    start = -(-file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
    file.seek(start)
    file.write(blob)
    file.flush()
    return partial(_mapped, file.fileno(), start, len(blob))


def _mapped(file: int, start: int, size: int) -> _native.Tensor:
    mapped = mmap.mmap(file, size, access=mmap.ACCESS_READ, offset=start)
    return _native.Tensor(np.frombuffer(mapped, np.uint8))
