"""Where peers of a real model come from: one object for each origin, each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from losa_deploy.interfaces import Runtime
from losa_deploy.progress import Progress, no_progress
from losa_deploy.sources.checkpoint import Checkpoint

from .synthetic.peers import Contender

Source = Callable[[], Checkpoint]


@dataclass(frozen=True)
class Material:
    """What peers are made of, and where."""

    dense: Path
    """The model as a dense GGUF file."""
    source: Source
    """Opens the same model as a Hugging Face folder, which takes a while."""
    folder: Path
    """Where they are written, or were by an earlier call; they are named after the dense file."""
    threads: int
    ours: Runtime
    """llama.cpp with our backend; its baseline is llama.cpp without."""
    progress: Progress = no_progress
    openvino_folder: Path | None = None
    """What OpenVINO GenAI was installed into; None: this environment."""


class PeerKind(Protocol):
    """Makes the peers of one origin."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the peers, as `--peers` takes them."""
        ...

    def make(self, name: str, material: Material) -> Contender:
        """The peer, made or reused.

        A `LosaError` says why there is none of this model, a `ResourceError` that there is no room.
        """
        ...
