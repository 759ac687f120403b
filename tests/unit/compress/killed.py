"""A compression that is killed again and again: `killed.py SOURCE RECIPE WHOLE CUT KILLS`."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import sys
from pathlib import Path

import torch

from losa_deploy.compress import partial, schedule
from losa_deploy.manifest import SourceRecord, sha256_file
from losa_deploy.recipe import Recipe
from losa_deploy.sources.checkpoint import Checkpoint

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
"""Audit events of changes in a folder; the first argument of each is a path. So is that of `open`."""


class Moments:
    """Counts what a compression does, where the parent of its process sees it, and kills it at one moment."""

    def __init__(self, folder: Path) -> None:
        self._shared, self._folder = mmap.mmap(-1, 8), str(folder)
        self.fatal = 0
        """The moment that ends the process before it is over; 0: none."""

    @property
    def seen(self) -> int:
        return int(struct.unpack("q", self._shared[:8])[0])

    @seen.setter
    def seen(self, count: int) -> None:
        self._shared[:8] = struct.pack("q", count)

    def _next(self) -> None:
        self.seen += 1
        if self.seen == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[object, ...]) -> None:
        """A file in the folder is about to be written, moved or removed."""
        writes = event == "open" and any(letter in str(arguments[1]) for letter in "wxa+")
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self._folder):
            self._next()

    def progress(self, done: int, total: int, label: str) -> None:
        """A block is finished or a step made. Text is sampled anew after a kill, so that does not count."""
        if "sampling" not in label:
            self._next()


def main(source: Path, recipe: Path, whole: Path, cut: Path, kills: int) -> None:
    """Compress into `whole`, then into `cut` by processes that are killed in turn; the last one is not.

    Prints how many moments the first took, then a line for each other: the moment to kill it at, its exit
    code, and how many moments it saw.
    """
    torch.set_num_threads(1)  # a forked process has none of the threads of the one that it comes from
    partial.SAVE_SECONDS = -1.0
    chosen = Recipe.model_validate_json(recipe.read_text("utf-8"))
    record = SourceRecord(id="tiny", files={"model.safetensors": sha256_file(source / "model.safetensors")})

    def compress(folder: Path, moments: Moments) -> None:
        sys.addaudithook(moments.audit)
        schedule.compress(Checkpoint.open(source), record, chosen, folder, progress=moments.progress)

    moments = Moments(whole)
    compress(whole, moments)
    sys.stdout.write(f"{moments.seen}\n")
    draw = random.Random(kills)
    for fatal in (*(draw.randint(1, moments.seen // 5) for _ in range(kills)), 0):
        cutting = Moments(cut)
        cutting.fatal = fatal
        sys.stdout.flush()
        child = os.fork()
        if not child:
            compress(cut, cutting)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{fatal} {status} {cutting.seen}\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:5]), int(sys.argv[5]))
