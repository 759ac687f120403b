"""What teaches phases through the model: the dense model's last states, itself, or its likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losa_deploy.compress.decoder import Decoder, Stream, batch_size, slices
from losa_deploy.compress.device import CPU
from losa_deploy.compress.losses import Likeliest, likeliest
from losa_deploy.compress.partial import Partial
from losa_deploy.compress.precision import uses_bf16
from losa_deploy.compress.streams import Streams
from losa_deploy.compress.team import Team
from losa_deploy.phases import PhaseRecipe

CHUNK_TOKENS = 65_536
"""Tokens that go through the dense model together: its blocks are read once for all of them."""


@dataclass(frozen=True)
class Cached:
    """What the dense model says of the sequences that a phase reads in this process."""

    likeliest: Likeliest
    """[rows, length, …], in memory or in files."""
    rows: Mapping[int, int]
    """Row by the number of a sequence."""

    def of(self, batch: Sequence[int]) -> Likeliest:
        """[batch, length, …] of these sequences."""
        return self.likeliest[torch.tensor([self.rows[index] for index in batch])]


Teacher = Tensor | Cached | None
"""[n, length, hidden] that the dense model's head reads of this process's sequences, or what it says of them.

None: the dense model itself has to be asked.
"""


def reads_states(phase: PhaseRecipe, *, last: bool) -> bool:
    """Whether what the walk through the blocks left teaches a phase of this or the last schedule step."""
    taught = phase.where == "model" and phase.losses.kl > 0 and phase.runs(last=last)
    return taught and phase.on_calibration


def is_cached(phase: PhaseRecipe, name: str, partial: Partial, team: Team, *, short: bool) -> bool:
    """Whether a phase's teacher is noted before training; `short`: memory is, which decides for `auto`.

    A run that goes on decides as it did before, whatever memory there is now.
    """
    if phase.teacher != "auto":
        return phase.teacher == "cached"
    known = partial.choice(name)
    votes = int(team.total(torch.tensor(float(short))))  # all have looked before one writes
    if known is None:
        known = "cached" if votes else "resident"
        if team.leads:
            partial.save_choice(name, known)
    team.wait()
    return known == "cached"


def from_states(stream: Stream, places: Sequence[int]) -> Iterator[Tensor]:
    """Batches of a stream after the last block, of the sequences at `places`."""
    for part in slices(0, len(places), stream.batch):
        yield stream.rows(torch.tensor(places[part], device=stream.hidden.device))


def through_model(dense: Decoder, tokens: Tensor, precision: str, room: Streams) -> Iterator[Tensor]:
    """Batches of the last block's output for `tokens` [n, length], with one block in memory at a time."""
    size = batch_size(tokens.shape[0])
    together = size * max(1, CHUNK_TOKENS // (size * tokens.shape[1]))
    usual, dense.streams = dense.streams, room
    try:
        for chunk in slices(0, tokens.shape[0], together):
            stream = dense.stream(tokens[chunk], size)
            for block in range(len(dense.blocks)):
                stream = dense.advance(block, stream, precision)
            for part in stream.batches():
                yield stream.rows(part)
    finally:
        dense.streams = usual


@torch.no_grad()
def cached(
    dense: Decoder,
    outputs: Iterator[Tensor],
    read: Sequence[int],
    length: int,
    count: int,
    precision: str,
    room: Streams,
) -> Cached:
    """Note the `count` likeliest next tokens at every position of the sequences `read`.

    `outputs` are batches [any, length, hidden] of the last block's output for these, in their order. What
    exceeds `room` lies in files.
    """
    dtype = torch.bfloat16 if uses_bf16(precision, dense.device) else torch.float32
    shape, count = (len(read), length), min(count, dense.head.out_features)
    found = Likeliest(
        room.empty((*shape, count), CPU, torch.int32),
        room.empty((*shape, count), CPU),
        room.empty(shape, CPU),
    )
    start = 0
    for hidden in outputs:
        part = likeliest(dense.last_norm(hidden).flatten(0, 1), dense.head, count, dtype)
        here, start = slice(start, start + len(hidden)), start + len(hidden)
        found.tokens[here] = part.tokens.view(-1, length, count).cpu()
        found.scores[here] = part.scores.view(-1, length, count).cpu()
        found.rest[here] = part.rest.view(-1, length).cpu()
    return Cached(found, {index: row for row, index in enumerate(read)})
