"""What runtimes are judged by: a model in torch, f32, with one block in memory and all questions at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from losa_deploy.assemble import fill, set_parameter
from losa_deploy.compress.decoder import Decoder, batch_size
from losa_deploy.errors import InputError
from losa_deploy.sources.checkpoint import Checkpoint

HINT = "Check that the artifact and the merged folder belong together."
Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Question:
    """A sequence, and of how many of its last positions the logits are wanted."""

    tokens: tuple[int, ...]
    last: int

    @classmethod
    def whole(cls, tokens: Sequence[int]) -> Question:
        """Of all positions."""
        return cls(tuple(tokens), len(tokens))


class Oracle(Decoder):
    """A checkpoint's model, or that with other weights in the place of some."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights | None = None) -> None:
        """`weights`: module name (no `.weight`) → [out, in]; each is looked up when its block is computed.

        A tied head becomes a weight of its own once embedding or head is named: to change both, name both.
        Raises `InputError` for an unknown module, here or when a block is opened for another shape.
        """
        super().__init__(checkpoint)
        self.weights = weights or {}
        for name in self.weights:
            if name in (self.family.embedding, self.family.head):
                self._replace(name)
            elif name not in self.names:
                raise InputError(
                    f"The model has no module {name!r}, but a weight for it was given.", hint=HINT
                )

    def load_block(self, block: int) -> None:
        """Read a block; what `weights` names comes from there."""
        names = self.block_parameters(block)
        fill(self.checkpoint, self.model, [n for n in names if n.removesuffix(".weight") not in self.weights])
        for name in self.block_linears(block):
            if name in self.weights:
                self._replace(name)

    def _replace(self, name: str) -> None:
        weight = torch.from_numpy(np.ascontiguousarray(self.weights[name]))
        found, expected = tuple(weight.shape), tuple(self.model.get_parameter(f"{name}.weight").shape)
        if found != expected:
            raise InputError(
                f"The weight given for {name} has shape {found}, the model's is {expected}.",
                hint=HINT,
            )
        set_parameter(self.model, f"{name}.weight", weight)

    @torch.no_grad()
    def answers(self, questions: Sequence[Question], *, threads: int) -> Iterator[NDArray[np.float32]]:
        """Logits [last, vocab] of each question, in their order, in one pass through the blocks.

        Logits exist for one question at a time. `threads` as in `torch_threads`.
        """
        with torch_threads(threads):
            features = self._features(questions)
        for question, hidden in zip(questions, features, strict=True):
            with torch_threads(threads):
                logits: NDArray[np.float32] = self.head(hidden[-question.last :]).numpy()
            yield logits

    def _features(self, questions: Sequence[Question]) -> list[torch.Tensor]:
        """What the head reads, [tokens, hidden], of each question; those of one length go together."""
        places: dict[int, list[int]] = {}
        for number, question in enumerate(questions):
            places.setdefault(len(question.tokens), []).append(number)
        streams = {}
        for length, numbers in places.items():
            tokens = torch.tensor([questions[number].tokens for number in numbers], dtype=torch.int64)
            streams[length] = self.stream(tokens, batch_size(len(numbers)))
        for block in range(len(self.blocks)):
            with self.open(block):
                streams = {length: self.advance(block, stream) for length, stream in streams.items()}
        found = {
            number: row
            for length, numbers in places.items()
            for number, row in zip(numbers, self.finish(streams[length]), strict=True)
        }
        return [found[number] for number in range(len(questions))]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with `count` torch threads (0: as they are); torch's setting is one per process."""
    before = torch.get_num_threads()
    if count > 0:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
