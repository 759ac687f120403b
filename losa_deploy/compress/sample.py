"""Text that a dense model writes itself: many sequences at once, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.device import Room, wide, wide_type
from losa_deploy.compress.memory import LIBRARY_BYTES, block_parameters, cache_bytes, outer_parameters
from losa_deploy.compress.precision import uses_bf16
from losa_deploy.compress.seeds import generator
from losa_deploy.pretrained import cache_argument
from losa_deploy.progress import Progress
from losa_deploy.recipe import CalibrationRecipe
from losa_deploy.sources.checkpoint import Checkpoint

BATCH = 128
"""Sequences that go on together in bf16: a weight is read once for all of them."""
BATCH_F32 = 64
"""The same in f32, where products take longer than reading the weights."""
FEWEST = 8
"""As long as their keys and values fit into memory, down to so many."""
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
) -> Tensor:
    """Text the dense model writes itself, [samples, sequence_length] int64; no data needed.

    Sequence i continues `starts[i % len(starts)]`, sampled at `recipe.temperature` among tokens that are
    at least `recipe.min_p` times as likely as the likeliest (Liu et al. 2023, LLM-QAT, arXiv 2305.17888,
    use a model's own text for quantization-aware training). Without starts the first token is uniform
    over the vocabulary. With more bytes of weights, keys and values than `room` has, fewer sequences go on
    together, and blocks are read for every token; what is drawn for a sequence does not depend on that.
    The processes of a team write a part each. `keep` may know what sequences that go on together became.
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
    resident, batch = _plan(source, dtype.itemsize, length, room.bytes)
    team = room.team
    given, chances = [given[i] for i in team.mine(range(recipe.samples))], team.rows(chances)
    parts = []
    total = length * -(-len(given) // batch)
    with dense.open(*range(len(dense.blocks))) if resident else dense.passing():
        for start in range(0, len(given), batch):
            done, part = length * (start // batch), slice(start, start + batch)
            make = partial(_continue, dense, given[part], chances[part], recipe, progress, done, total)
            parts.append(keep(f"{start}-{start + batch}", make))
    return team.gathered(torch.cat(parts), recipe.samples)


def _chances(samples: int, length: int, draw: torch.Generator) -> Tensor:
    """Uniform numbers [samples, length] f64: those of `BATCH` sequences after each other, by position."""
    parts = []
    for start in range(0, samples, BATCH):
        rows = min(BATCH, samples - start)
        columns = [torch.rand(rows, 1, generator=draw, dtype=torch.float64) for _ in range(1, length)]
        parts.append(torch.cat([torch.zeros(rows, 1, dtype=torch.float64), *columns], dim=1))
    return torch.cat(parts)


def most_together(element: int) -> int:
    """Sequences that go on together if memory is plenty, with so many bytes for each number."""
    return BATCH if element == 2 else BATCH_F32


def _plan(source: Checkpoint, element: int, length: int, memory: int) -> tuple[bool, int]:
    """Whether all blocks stay in memory, and how many sequences go on together."""
    free = memory - LIBRARY_BYTES - element * outer_parameters(source)
    each = cache_bytes(source.config, length, element)
    whole = element * source.block_count * block_parameters(source)
    if free >= whole + FEWEST * each:
        return True, min(most_together(element), (free - whole) // each)
    return False, min(
        most_together(element), max(FEWEST, (free - element * block_parameters(source)) // each)
    )


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
    progress: Progress,
    done: int,
    total: int,
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
        progress(done + position + 1, total, "sampling calibration text")
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
