"""Which of many files of one model to take on this machine, by quality, speed and bytes; pure.

Nothing is weighed against each other: a verdict says which file is best in each of the three, and for each
of the user's own files whether another one is no worse in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Required, TypedDict

from losa_deploy.verify.distance import Floats

from .accuracy import loss_difference
from .rival_verdict import LEAST_NOISE, SURE

SAME_SIZE = 0.01
"""Files whose sizes differ by less are equally small."""


@dataclass(frozen=True)
class Entry:
    """One file of the model, as it was measured."""

    name: str
    bytes: int
    decode: float
    """Tokens per second."""
    noise: float
    """Relative standard deviation of the decode speed."""
    perplexity: float
    losses: Sequence[Floats]
    """Negative log-likelihoods [n] of every window, in nats: all entries meet the same windows."""
    own: bool = False
    """A file that the user asks about, not a peer."""

    @property
    def numbers(self) -> str:
        """All of them in one line."""
        return (
            f"perplexity {self.perplexity:.2f}, decode {self.decode:.1f} tokens/s, {self.bytes / 1e6:.1f} MB"
        )


Beats = Callable[[Entry, Entry], bool]
"""Whether the first is surely ahead of the second in one respect."""


def better(a: Entry, b: Entry) -> bool:
    """In quality, by more than chance over the same tokens."""
    found = loss_difference(b.losses, a.losses)
    return found.value > SURE * found.stderr


def faster(a: Entry, b: Entry) -> bool:
    """In decode speed, beyond the noise of both."""
    return a.decode > b.decode * (1 + _noise(a, b))


def smaller(a: Entry, b: Entry) -> bool:
    """In bytes."""
    return a.bytes < b.bytes * (1 - SAME_SIZE)


def _noise(a: Entry, b: Entry) -> float:
    return max(LEAST_NOISE, a.noise, b.noise)


WISHES: dict[str, tuple[Beats, ...]] = {
    "quality": (better, faster, smaller),
    "speed": (faster, better, smaller),
    "size": (smaller, better, faster),
}
"""What a user may want most → respects in the order in which they decide."""


def best(entries: Sequence[Entry], wish: str) -> Entry:
    """The file to take for a wish; what none surely beats in it, and of those the best in the other two."""
    pool = list(entries)
    for beats in WISHES[wish]:
        pool = [e for e in pool if not any(beats(other, e) for other in pool)] or pool
    return min(pool, key=lambda e: e.perplexity)


def dominates(a: Entry, b: Entry) -> bool:
    """Whether `a` is no worse than `b` in all three respects and ahead in one of them."""
    respects = WISHES["quality"]
    return not any(beats(b, a) for beats in respects) and any(beats(a, b) for beats in respects)


def front(entries: Sequence[Entry]) -> list[Entry]:
    """Files that no other one dominates."""
    return [e for e in entries if not any(dominates(other, e) for other in entries)]


class Verdict(TypedDict, total=False):
    """The part `verdict` of a `losa.bench/1` document: names of files, and sentences of them."""

    take: dict[str, str]
    front: list[str]
    files: list[dict[str, object]]
    lines: Required[list[str]]


def verdict(entries: Sequence[Entry]) -> Verdict:
    """Which files to take; with fewer than two only the line that says so."""
    if len(entries) < 2:
        return {"lines": ["Nothing to choose from: fewer than two files have speed and quality."]}
    takes = {wish: best(entries, wish) for wish in WISHES}
    own = [_own_file(e, entries) for e in entries if e.own]
    return {
        "take": {wish: entry.name for wish, entry in takes.items()},
        "front": [entry.name for entry in front(entries)],
        "files": [record for record, _ in own],
        "lines": [*_take_lines(takes, len(entries)), *(line for _, line in own)],
    }


def _take_lines(takes: dict[str, Entry], count: int) -> list[str]:
    """One sentence per file that is best in something."""
    wishes: dict[str, list[str]] = {}
    for wish, entry in takes.items():
        wishes.setdefault(entry.name, []).append(wish)
    if len(wishes) == 1:
        entry = takes["quality"]
        return [f"Take {entry.name} ({entry.numbers}): none of {count} files is better, faster or smaller."]
    by_name = {entry.name: entry for entry in takes.values()}
    return [
        f"For {' and '.join(found)} take {name} ({by_name[name].numbers})." for name, found in wishes.items()
    ]


def _own_file(own: Entry, entries: Sequence[Entry]) -> tuple[dict[str, object], str]:
    """What stands beside one of the user's files, and the sentence of it."""
    over = [e for e in entries if dominates(e, own)]
    quick = best([e for e in entries if not faster(own, e)], "quality")
    small = best([e for e in entries if not smaller(own, e)], "quality")
    record: dict[str, object] = {
        "name": own.name,
        "dominated_by": [e.name for e in over],
        "best_at_no_less_speed": quick.name,
        "best_at_no_more_bytes": small.name,
    }
    if over:
        other = best(over, "quality")
        return record, f"Instead of {own.name} take {other.name}: {_compared(other, own)}."
    parts = [f"No other file is as good, as fast and as small as {own.name}"]
    for found, limit in ((quick, "no less speed"), (small, "no more bytes")):
        if found.name != own.name and better(found, own):
            parts.append(f"at {limit} the best is {found.name} ({_compared(found, own)})")
        else:
            parts.append(f"at {limit} none is surely better")
    return record, "; ".join(parts) + "."


def _compared(a: Entry, b: Entry) -> str:
    """How `a` is against `b`, in all three respects."""
    found = loss_difference(b.losses, a.losses)
    error = f"{abs(found.value):.3f} ± {found.stderr:.3f} nats per token"
    quality = f"{error} {'better' if found.value > 0 else 'worse'}"
    if not better(a, b) and not better(b, a):
        quality = f"equally good within chance ({error})"
    speed = f"decode {a.decode / b.decode:.2f}×"
    if not faster(a, b) and not faster(b, a):
        speed = f"as fast within noise ({speed}, ±{_noise(a, b):.0%})"
    change = a.bytes / b.bytes - 1
    size = f"{abs(change):.0%} {'smaller' if change < 0 else 'larger'}"
    if not smaller(a, b) and not smaller(b, a):
        size = "of the same size"
    return f"{quality}, {speed}, {size}"
