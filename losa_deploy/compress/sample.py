"""Text that a dense model writes itself: many sequences at once, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock

import torch
from torch import Tensor, nn

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.device import CPU, Room, wide, wide_type
from losa_deploy.compress.memory import LIBRARY_BYTES, block_parameters, cache_bytes, outer_parameters
from losa_deploy.compress.precision import uses_bf16
from losa_deploy.compress.seeds import generator
from losa_deploy.pretrained import cache_argument
from losa_deploy.progress import Progress
from losa_deploy.recipe import CalibrationRecipe
from losa_deploy.sources.checkpoint import Checkpoint

BATCH = 128
"""Sequences that go on together in bf16: a weight is read once for all of them."""
BATCH_PACKED = 64
"""The same with packed weights, where products take longer than reading the weights."""
FEWEST = 8
"""As long as their keys and values fit into memory, down to so many."""
MOST_WORKERS = 4
"""Threads that write text: between products they take turns in Python."""
SCORE_BYTES = 16
"""For each entry of the vocabulary of a sequence: its score, chance and what is computed from these."""
Keep = Callable[[str, Callable[[], Tensor]], Tensor]
"""Gives the tokens with a name: those that are kept under it, or what the function makes."""
GROUPED = "losa_grouped"
"""transformers' name of the attention that `_register_attention` registers."""
WIDTH = 256
"""Entries of a distribution that are summed up first when one is drawn."""


def not_kept(name: str, make: Callable[[], Tensor]) -> Tensor:
    """Makes them."""
    del name
    return make()


def sampled_tokens(
    source: Checkpoint,
    recipe: CalibrationRecipe,
    starts: Sequence[Sequence[int]],
    seed: int,
    precision: str,
    progress: Progress,
    room: Room,
    keep: Keep = not_kept,
    folder: Path | None = None,
) -> Tensor:
    """Text the dense model writes itself, [samples, sequence_length] int64; no data needed.

    Sequence i continues `starts[i % len(starts)]`, sampled at `recipe.temperature` among tokens that are
    at least `recipe.min_p` times as likely as the likeliest (Liu et al. 2023, LLM-QAT, arXiv 2305.17888,
    use a model's own text for quantization-aware training). Without starts the first token is uniform
    over the vocabulary. A CPU that does not compute in bf16 multiplies weights of eight bits by the kernels
    of the runtimes, in several threads that write parts of the text. With less memory in `room`, fewer
    sequences go on together, and weights lie in a file in `folder`, or are read for every token; what is
    drawn for a sequence does not depend on that. The processes of a team write a part each. `keep` may know
    what sequences that go on together became.
    """
    draw = generator(seed, "calibration")
    length = recipe.sequence_length
    # In bf16 weights are read twice as fast, and so are keys and values.
    dtype = torch.bfloat16 if uses_bf16(precision, room.device) else torch.float32
    _register_attention()
    dense = Decoder(source, dtype=dtype, attention=GROUPED, device=room.device)
    drawn = torch.randint(dense.head.out_features, (recipe.samples,), generator=draw).tolist()
    given = [list(starts[i % len(starts)])[:length] if starts else [drawn[i]] for i in range(recipe.samples)]
    # The frequencies of positions too: with these in f32 the default seed gives another text, with which
    # SmolLM2-135M comes out much worse on WikiText-2. Why is not known yet.
    dense.model.to(dtype)
    chances = _chances(recipe.samples, length, draw)
    team = room.team
    given, chances = [given[i] for i in team.mine(range(recipe.samples))], team.rows(chances)
    plan = _plan(dense, len(given), length, room)
    steps = _Steps(progress, (length - 1) * -(-len(given) // plan.together))

    def part(start: int) -> Tensor:
        rows = slice(start, start + plan.together)
        written = False

        def write() -> Tensor:
            nonlocal written
            written = True
            return _continue(dense, given[rows], chances[rows], recipe, steps)

        tokens = keep(f"{start}-{start + plan.together}", write)
        if not written:
            steps.add(length - 1)
        return tokens

    with _weights(dense, plan, folder):
        parts = _at_once(part, range(0, len(given), plan.together), plan, steps)
    return team.gathered(torch.cat(parts), recipe.samples)


@dataclass(frozen=True)
class _Plan:
    """How the sequences of a process are written."""

    packed: bool
    """With weights of eight bits."""
    resident: bool
    """All weights of the blocks stay in memory."""
    together: int
    """Sequences that go on together."""
    workers: int = 1
    """Threads that do so."""
    threads: int = 1
    """Threads of the products of each."""


@dataclass
class _Steps:
    """Tokens that all workers together have added to their sequences."""

    progress: Progress
    total: int
    done: int = 0
    stop: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def add(self, count: int = 1) -> None:
        """Raises `CancelledError` once the run is to end."""
        if self.stop.is_set():
            raise CancelledError
        with self.lock:
            self.done += count
            self.progress(self.done, self.total, "sampling calibration text")


@contextmanager
def _weights(dense: Decoder, plan: _Plan, folder: Path | None) -> Iterator[None]:
    if plan.packed:
        from losa_deploy.compress.packed_linear import packed_linears  # loads the kernels

        with packed_linears(dense, plan.resident, folder, plan.threads):
            yield
    else:
        with dense.open(*range(len(dense.blocks))) if plan.resident else dense.passing():
            yield


def _at_once(
    make: Callable[[int], Tensor], starts: Sequence[int], plan: _Plan, steps: _Steps
) -> list[Tensor]:
    """What `make` gives for each of `starts`; the first error ends all workers.

    Threads of torch that share every small product wait for each other most of the time, so each worker has
    some for itself.
    """
    if plan.workers == 1:
        return [make(start) for start in starts]
    before = torch.get_num_threads()
    workers = ThreadPoolExecutor(plan.workers, "sampling", torch.set_num_threads, (plan.threads,))
    try:
        running = [workers.submit(make, start) for start in starts]
        return [part.result() for part in running]
    finally:
        steps.stop.set()
        workers.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _chances(samples: int, length: int, draw: torch.Generator) -> Tensor:
    """Uniform numbers [samples, length] f64: those of `BATCH` sequences after each other, by position."""
    parts = []
    for start in range(0, samples, BATCH):
        rows = min(BATCH, samples - start)
        columns = [torch.rand(rows, 1, generator=draw, dtype=torch.float64) for _ in range(1, length)]
        parts.append(torch.cat([torch.zeros(rows, 1, dtype=torch.float64), *columns], dim=1))
    return torch.cat(parts)


def arranged(packed: bool, samples: int, threads: int, free: int, blocks: int, each: int) -> tuple[int, int]:
    """How many of `samples` sequences go on together, and in how many workers.

    Of `free` bytes the weights of the blocks that are in memory take `blocks`, and every sequence `each`.
    """
    workers = min(threads, MOST_WORKERS, -(-samples // FEWEST)) if packed else 1
    together = min(BATCH_PACKED if packed else BATCH, -(-samples // workers))
    workers = min(workers, -(-samples // together))
    most = max(FEWEST, (free - blocks) // max(1, each))
    if workers * together > most:
        workers = max(1, min(workers, most // FEWEST))
        together = min(together, most // workers)
    return together, workers


def _plan(dense: Decoder, samples: int, length: int, room: Room) -> _Plan:
    source, element, head = dense.checkpoint, dense.dtype.itemsize, dense.head
    packed, threads = is_packed(room.device, dense.dtype), torch.get_num_threads()
    each = cache_bytes(source.config, length, element) + SCORE_BYTES * head.out_features
    free = room.bytes - LIBRARY_BYTES - element * outer_parameters(source)
    free -= head.weight.numel() if packed else 0
    whole = (1 if packed else element) * source.block_count * block_parameters(source)
    resident = free >= whole + FEWEST * each
    blocks = whole if resident else element * block_parameters(source)
    together, workers = arranged(packed, samples, threads, free, blocks, each)
    return _Plan(packed, resident, together, workers, max(1, threads // workers))


def is_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights of eight bits and the kernels of the runtimes write the text."""
    return device == CPU and dtype == torch.float32


def _register_attention() -> None:
    """Let models of transformers attend from one new token in less than half the time.

    Query heads that share a key head become queries of that head, so that keys and values are read once.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(GROUPED, _attend)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """One query per sequence, [batch, heads, 1, head size]; gives [batch, 1, heads, head size]."""
    batch, heads, size = query.shape[0], query.shape[1], query.shape[3]
    packed = query.view(batch, key.shape[1], heads // key.shape[1], size)
    output = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(batch, 1, heads, size), None


@torch.no_grad()
def _continue(
    dense: Decoder,
    starts: Sequence[Sequence[int]],
    chances: Tensor,
    recipe: CalibrationRecipe,
    steps: _Steps,
) -> Tensor:
    """Extend starts of any lengths to [batch, sequence_length] by ancestral sampling.

    `chances` [batch, sequence_length] are uniform numbers, see `draw_tokens`. All sequences go on together:
    while one still has tokens of its start, these are taken.
    """
    from losa_deploy.compress.key_cache import key_cache  # imports transformers

    result = torch.zeros(len(starts), recipe.sequence_length, dtype=torch.int64)
    lengths = torch.tensor([len(start) for start in starts])
    for row, start in enumerate(starts):
        result[row, : len(start)] = torch.tensor(start)
    argument = {cache_argument(dense.model): key_cache(len(dense.blocks), recipe.sequence_length)}
    for position in range(1, recipe.sequence_length):
        last = result[:, position - 1 : position].to(dense.device)
        output = dense.model(input_ids=last, use_cache=True, **argument)
        weights = likely(output.logits[:, -1].float(), recipe.temperature, recipe.min_p)
        chance = chances[:, position : position + 1].to(dense.device, wide_type(dense.device))
        found = draw_tokens(weights, chance)[:, 0].cpu()
        result[:, position] = torch.where(lengths > position, result[:, position], found)
        steps.add()
    return result


def likely(logits: Tensor, temperature: float, min_p: float) -> Tensor:
    """Probabilities up to a factor per row, [batch, vocabulary]; 0 below `min_p` times the largest."""
    scores = logits - logits.amax(dim=-1, keepdim=True)
    if temperature != 1.0:
        scores /= temperature
    chances = scores.exp_()
    return chances.masked_fill_(chances < min_p, 0.0) if min_p else chances


def draw_tokens(weights: Tensor, chances: Tensor) -> Tensor:
    """One index per row of [batch, vocabulary], [batch, 1] int64, in proportion to the row's entries.

    `chances` [batch, 1] f64 are uniform in [0, 1). By the inverse of the distribution function in f64, first
    among sums of `WIDTH` entries, then inside: torch.multinomial draws a random number for every entry of a
    large vocabulary.
    """
    rows, entries = weights.shape
    grouped = nn.functional.pad(weights, (0, -entries % WIDTH)).view(rows, -1, WIDTH)
    sums = grouped.sum(dim=-1, dtype=wide_type(grouped.device))
    group, rest = _place(sums, chances.to(sums.dtype) * sums.sum(dim=-1, keepdim=True))
    inside = wide(grouped[torch.arange(rows, device=grouped.device), group[:, 0]])
    place, _ = _place(inside, rest)
    return group * WIDTH + place


def _place(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The entry of each row of [rows, n] in which the running sum passes `target` [rows, 1], and the rest.

    Never an entry that is 0, whatever rounding does to the sums.
    """
    running = weights.cumsum(dim=-1)
    last = running[:, -1:]
    inside = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    found = torch.searchsorted(running, inside, right=True)
    return found, inside - (running.gather(1, found) - weights.gather(1, found))
