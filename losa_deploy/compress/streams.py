"""Where the hidden states of the calibration lie: in memory up to a limit, past it in files."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class Streams:
    """Makes room for streams. Those past `limit` bytes are memory-mapped files, whose names are gone at once.

    A file goes with the last tensor that lies in it, also if the process is killed.
    """

    def __init__(self, folder: Path, limit: int, dtype: torch.dtype = torch.float32) -> None:
        """`folder` is made when the first file is; it must lie on a disk with room for a few streams.

        `dtype` is that of streams.
        """
        self._folder, self._limit, self.dtype = folder, limit, dtype
        self.held = 0
        """Bytes of streams in memory."""

    def empty(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with any numbers; on a device, and for an empty shape, always in its memory."""
        size = dtype.itemsize * math.prod(shape)
        if device.type != "cpu" or not size:
            return torch.empty(*shape, device=device, dtype=dtype)
        if self.held + size > self._limit:
            return self._mapped(shape, dtype)
        result = torch.empty(*shape, dtype=dtype)
        self.held += size
        weakref.finalize(result.untyped_storage(), self._release, size)
        return result

    def _release(self, size: int) -> None:
        self.held -= size

    def _mapped(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._folder.mkdir(parents=True, exist_ok=True)
        count = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".losa-stream-") as file:
            # A full disk is found now, not in the middle.
            os.posix_fallocate(file.fileno(), 0, dtype.itemsize * count)
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype).view(*shape)
