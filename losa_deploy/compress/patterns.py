"""Masks whose positions are chosen together: sliding windows, and pairs of rows.

Scores [out, in] are not negative; what is maximised is their sum. Masks [out, in] are bool, True = kept.
A position that is not `allowed` is never kept. Sums are f64, and ties fall the same way on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from losa_deploy.compress.device import CPU, wide
from losa_deploy.structure import WINDOW, first_slots, window_starts

BLOCK = 32
"""Columns that SparseGPT chooses at a time: an error 4 % below that of 128, in the same time."""
LOOK_AHEAD = 16
"""Columns beyond a block that its search sees; the choice there is made again with the next block."""
ROWS = 2048
"""Rows that are searched at a time: bounds the memory of the search."""
SKIP = WINDOW
"""Backward pointer of a slot that stays empty."""


def select_pairs(scores: Tensor, allowed: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """One mask for the rows 2 i and 2 i + 1: what `choose(scores, allowed)` makes of their summed scores.

    A position that one row of a pair may not keep is kept by neither. A last row without a partner is
    chosen by itself.
    """
    rows, columns = scores.shape
    paired = rows - rows % 2
    masks = []
    if paired:
        summed = wide(scores[:paired].view(-1, 2, columns)).sum(dim=1)
        both = allowed[:paired].view(-1, 2, columns).all(dim=1)
        masks.append(choose(summed, both).repeat_interleave(2, dim=0))
    if rows > paired:
        masks.append(choose(scores[paired:], allowed[paired:]))
    return torch.cat(masks)


def select_sliding(scores: Tensor, stride: Fraction, allowed: Tensor) -> Tensor:
    """The best mask of sliding windows (`structure.window_starts`): a slot keeps one position of its window.

    Kept positions ascend from slot to slot. A slot stays empty only where nothing allowed is left for it:
    of all masks with the largest sum, one with the most kept positions is returned.
    """
    rows, columns = scores.shape
    mask = torch.empty_like(allowed)
    for start in range(0, rows, ROWS):
        part = slice(start, min(start + ROWS, rows))
        windows = Sliding(stride, part.stop - start, columns, scores.device)
        mask[part] = windows.choose(scores[part], allowed[part], columns)
    return mask


class Sliding:
    """Chooses a mask of sliding windows block by block of columns, from left to right.

    `last` [rows] is the last slot that the columns chosen so far need when every kept position takes the
    first slot it can: whatever is kept further right may use all slots behind it, and no other.
    """

    def __init__(self, stride: Fraction, rows: int, columns: int, device: torch.device = CPU) -> None:
        self.starts = window_starts(columns, stride)
        self.first = torch.tensor(first_slots(columns, stride), device=device)
        self.last = torch.full((rows,), -1, device=device)
        self.done = 0

    def choose(self, scores: Tensor, allowed: Tensor, width: int) -> Tensor:
        """The mask [rows, width] of the next `width` columns, with a look at all columns of `scores`."""
        rows, seen = scores.shape
        slots = [j for j, start in enumerate(self.starts) if -WINDOW < start - self.done < seen]
        starts = [self.starts[j] - self.done + WINDOW for j in slots]
        numbers = wide(scores)
        gains = numbers.new_full((seen + 2 * WINDOW, rows), float("-inf"))
        gains[WINDOW:-WINDOW] = numbers.masked_fill(~allowed, float("-inf")).T
        taken = self.last - (slots[0] if slots else 0) + 1
        pointers = _forward(gains, starts, taken)
        mask = _backward(pointers, starts, len(gains))[WINDOW : WINDOW + width].T.contiguous()
        self._advance(mask)
        return mask

    def _advance(self, mask: Tensor) -> None:
        """Count the slots of the next columns: the k-th of them needs one behind that of the (k-1)-th."""
        count = mask.sum(dim=1)
        needed = self.first[self.done : self.done + mask.shape[1]] - mask.cumsum(dim=1) + 1
        latest = needed.masked_fill(~mask, -1).amax(dim=1)
        self.last = torch.where(count > 0, torch.maximum(self.last + 1, latest) + count - 1, self.last)
        self.done += mask.shape[1]


def _forward(gains: Tensor, starts: Sequence[int], taken: Tensor) -> Tensor:
    """Viterbi search over slots: pointers [slots, WINDOW, rows] for `_backward`.

    State d of a slot is the best sum with no position kept beyond place d of its window. Its pointer is the
    place that the slot keeps, or `SKIP`. `gains` is [columns, rows]; the first `taken` [rows] slots are
    not free. On ties a slot is filled, and further right: that leaves the most room to the slots before it,
    and so fills as many as can be.
    """
    rows = gains.shape[1]
    pointers = gains.new_empty((len(starts), WINDOW, rows), dtype=torch.uint8)
    state = gains.new_zeros((WINDOW, rows))
    most = int(taken.max()) if rows else 0
    before = 0
    for slot, start in enumerate(starts):
        empty = state[_places(start - before, gains.device)]
        filled = gains[start : start + WINDOW] + state[_places(start - before - 1, gains.device)]
        if slot < most:
            filled.masked_fill_(taken > slot, float("-inf"))
        best, place = filled[0], pointers.new_zeros(rows)
        state = torch.empty_like(state)
        for d in range(WINDOW):
            place = torch.where(filled[d] >= best, d, place)
            best = torch.maximum(best, filled[d])
            pointers[slot, d] = torch.where(best >= empty[d], place, SKIP)
            state[d] = torch.maximum(best, empty[d])
        before = start
    return pointers


def _backward(pointers: Tensor, starts: Sequence[int], columns: int) -> Tensor:
    """The kept positions [columns, rows] of the best path; the last column is never in a window."""
    rows = pointers.shape[2]
    mask = pointers.new_zeros((columns, rows), dtype=torch.bool)
    state = pointers.new_full((rows,), WINDOW - 1, dtype=torch.int64)
    for slot in reversed(range(len(starts))):
        place = pointers[slot].gather(0, state[None])[0].long()
        filled = place != SKIP
        mask.scatter_(0, torch.where(filled, starts[slot] + place, columns - 1)[None], True)
        step = starts[slot] - starts[slot - 1] if slot else WINDOW
        state = torch.where(filled, place - 1, state).add_(step).clamp_(max=WINDOW - 1)
    return mask


@lru_cache(maxsize=4 * WINDOW)
def _places(shift: int, device: torch.device) -> Tensor:
    """Places of the window before, `shift` positions further left, that hold what places 0 … 3 may see."""
    return torch.arange(WINDOW, device=device).add_(shift).clamp_(max=WINDOW - 1)
