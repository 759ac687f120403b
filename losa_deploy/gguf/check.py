"""The numbers of a GGUF that llama.cpp builds its graph from, checked before llama.cpp sees them.

It ends the whole process where one of them is absurd: an epsilon that is no number, more blocks than it has
room for, a rotary embedding wider than a head. What a file does not say is not asked for, because every
architecture has keys of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from losa_deploy.errors import InputError
from losa_deploy.gguf.file import GgufHeader, open_header
from losa_deploy.gguf.names import ARCHITECTURE, BLOCKS, EMBEDDING, LINEARS, PREFIX

MOST_BLOCKS = MOST_EXPERTS = 512
"""llama.cpp has room for so many."""
MOST_SIZE = (1 << 31) - 1
"""Of anything that is counted: llama.cpp computes with 32 bits."""
FLOATS = (6, 12)
"""GGUF's numbers of the floating-point types."""
POSITIVE = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.group_norm_epsilon",
    "rope.freq_base",
    "rope.freq_base_swa",
)
SIZES = (
    "attention.key_length",
    "attention.value_length",
    "context_length",
    "embedding_length",
    "vocab_size",
)
"""Whole numbers from 1."""
BLOCK = re.compile(rf"(?:{re.escape(PREFIX)})?{re.escape(BLOCKS)}(\d+)\.")
QUERIES = (LINEARS["self_attn.q_proj"], "attn_qkv")
"""What blocks with attention have one of."""


@cache
def whole_heads() -> frozenset[str]:
    """Architectures of which llama.cpp rotates whole heads and nothing less."""
    lines = (resources.files("losa_deploy") / "data" / "whole_heads.txt").read_text("utf-8").splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


@dataclass(frozen=True)
class Finding:
    """One key that is not as it must be."""

    key: str
    found: object
    expected: str


def check_gguf(path: Path) -> None:
    """Raise `InputError` if the numbers of a GGUF of any architecture cannot be a model's."""
    with open_header(path) as header:
        check_keys(header, header.text(ARCHITECTURE))


def check_keys(header: GgufHeader, architecture: str) -> None:
    """The same for an open file that stands for `architecture`."""
    for rule in RULES:
        for finding in rule(Keys(header, architecture)):
            raise InputError(
                f"{header.path} cannot be run: its {finding.key} is {finding.found}, expected "
                f"{finding.expected}.",
                hint="Copy or download it again, or convert the model again.",
            )


@dataclass(frozen=True)
class Keys:
    """The keys of one architecture, by their names without it."""

    header: GgufHeader
    architecture: str

    def full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def number(self, key: str) -> int | float | None:
        """None if the file has no such key, or a list with a number for each block."""
        return self.header.number(self.full(key))

    def wrong(self, key: str, expected: str) -> Finding:
        return Finding(self.full(key), self.number(key), expected)

    def blocks(self) -> int:
        """How many blocks the tensors are of: one more than the highest number."""
        found = (match for name in self.header.shapes if (match := BLOCK.match(name)))
        return max((int(match[1]) + 1 for match in found), default=0)

    def has(self, *parts: str) -> bool:
        """True if a block has one of these tensors."""
        return any(f".{part}.weight" in name for name in self.header.shapes for part in parts)

    def head(self) -> int | float | None:
        """Length of a head's keys, if that is the same in all blocks."""
        length, width, heads = map(self.number, ("attention.key_length", "embedding_length", HEADS))
        return length if length is not None else width // heads if width and heads else None


HEADS, KV_HEADS = "attention.head_count", "attention.head_count_kv"


def _floats(keys: Keys) -> Iterator[Finding]:
    """Numbers that are not finite mean nothing; some have to be above zero."""
    prefix = keys.full("")
    for name, value in keys.header.keys.items():
        if name.startswith(prefix) and value.type in FLOATS:
            found = keys.header.number(name)
            assert found is not None  # its type is one of numbers
            if not math.isfinite(found):
                yield Finding(name, found, "a finite number")
    for key in POSITIVE:
        number = keys.number(key)
        if number is not None and not number > 0:
            yield keys.wrong(key, "a number above 0")
    factor = keys.number("rope.scaling.factor")  # 0 means none
    if factor is not None and factor < 0:
        yield keys.wrong("rope.scaling.factor", "a number of at least 0")


def _sizes(keys: Keys) -> Iterator[Finding]:
    for key in SIZES:
        number = keys.number(key)
        if number is not None and not _whole(number, 1, MOST_SIZE):
            yield keys.wrong(key, f"a whole number from 1 to {MOST_SIZE}")


def _blocks(keys: Keys) -> Iterator[Finding]:
    """As many as there are tensors of; blocks that predict further tokens may have been left out."""
    count, found = keys.number("block_count"), keys.blocks()
    if count is None:
        return
    if not _whole(count, 1, MOST_BLOCKS):
        yield keys.wrong("block_count", f"a whole number from 1 to {MOST_BLOCKS}")
    further = keys.number("nextn_predict_layers") or 0
    whole_model = (keys.header.number("split.count") or 1) <= 1
    if found and whole_model and not count - further <= found <= count:
        yield keys.wrong(
            "block_count", f"{found}, of which there are tensors ({BLOCKS}0 to {BLOCKS}{found - 1})"
        )


def _heads(keys: Keys) -> Iterator[Finding]:
    """Models without attention have no heads, and say so with 0."""
    heads, shared, width = keys.number(HEADS), keys.number(KV_HEADS), keys.number("embedding_length")
    attends = keys.has(*QUERIES)
    for key, number in ((HEADS, heads), (KV_HEADS, shared)):
        if number is not None and not _whole(number, int(attends), MOST_SIZE):
            yield keys.wrong(key, f"a whole number from {int(attends)} to {MOST_SIZE}")
    if heads and width and keys.number("attention.key_length") is None and width % heads:
        yield keys.wrong(HEADS, f"a divisor of embedding_length, {width}")
    if heads and shared and heads % shared:
        yield keys.wrong(KV_HEADS, f"a divisor of head_count, {heads}")


def _rotary(keys: Keys) -> Iterator[Finding]:
    """No more of a head than there is, and in pairs."""
    rotated, head = keys.number("rope.dimension_count"), keys.head()
    if rotated is None or head is None:
        return
    if keys.architecture in whole_heads() and rotated != head:
        yield keys.wrong("rope.dimension_count", f"{head}, the length of a head")
    if not _whole(rotated, 0, head) or rotated % 2:
        yield keys.wrong("rope.dimension_count", f"an even number up to {head}, the length of a head")


def _experts(keys: Keys) -> Iterator[Finding]:
    count, used = keys.number("expert_count") or 0, keys.number("expert_used_count") or 0
    if not _whole(count, 0, MOST_EXPERTS):
        yield keys.wrong("expert_count", f"a whole number up to {MOST_EXPERTS}")
    if not _whole(used, min(count, 1), count):
        yield keys.wrong("expert_used_count", f"from {min(count, 1)} to expert_count, {count}")


def _embedding(keys: Keys) -> Iterator[Finding]:
    """Width and number of tokens against the table of tokens; audio models have one of another width."""
    shape = keys.header.shapes.get(EMBEDDING)
    if shape is None or len(shape) != 2 or keys.number("features_length") is not None:
        return
    for key, length in zip(("embedding_length", "vocab_size"), shape, strict=True):
        number = keys.number(key)
        if number is not None and number != length:
            yield keys.wrong(key, f"{length} as in {EMBEDDING} [{shape[1]}, {shape[0]}]")


def _tokens(keys: Keys) -> Iterator[Finding]:
    """llama.cpp reads as many scores and types as there are tokens."""
    count = keys.header.array_length("tokenizer.ggml.tokens")
    for name in ("scores", "token_type"):
        length = keys.header.array_length(f"tokenizer.ggml.{name}")
        if count is not None and length is not None and length != count:
            yield Finding(f"tokenizer.ggml.{name}", f"a list of {length}", f"{count}, one for each token")


def _whole(number: float, least: float, most: float) -> bool:
    return number == int(number) and least <= number <= most if math.isfinite(number) else False


RULES: tuple[Callable[[Keys], Iterator[Finding]], ...] = (
    _floats,
    _sizes,
    _embedding,
    _blocks,
    _heads,
    _rotary,
    _experts,
    _tokens,
)
