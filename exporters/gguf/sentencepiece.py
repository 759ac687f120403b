"""Reads a SentencePiece `tokenizer.model`: pieces with scores and types, and two flags of its normalizer.

The file is a protocol buffer; the four fields that matter do not justify another dependency.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from losa_deploy.errors import InputError

BPE = 2
"""`TrainerSpec.model_type` of the kind that Llama models use; 1 is a unigram model."""


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int
    """As in GGUF: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""


@dataclass(frozen=True)
class SentencePiece:
    """What llama.cpp needs of the model."""

    pieces: tuple[Piece, ...]
    bpe: bool
    prefix: bool
    """A space is put before the text."""
    collapse: bool
    """Several spaces become one."""
    rules: str
    """Name of the normalization of characters; llama.cpp has none but `identity`."""


def read_sentencepiece(path: Path) -> SentencePiece:
    """Parse the file; `InputError` if it is damaged."""
    pieces: list[Piece] = []
    bpe, prefix, collapse, rules = False, True, True, "identity"
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                bpe = any(n == 3 and v == BPE for n, v in _fields(value))
            elif number == 3 and isinstance(value, bytes):
                flags = dict(_fields(value))
                prefix, collapse = bool(flags.get(3, 1)), bool(flags.get(4, 1))
                name = flags.get(1, b"")
                rules = name.decode("utf-8") if isinstance(name, bytes) and name else rules
    except (ValueError, struct.error) as error:
        raise InputError(
            f"{path} cannot be read as a SentencePiece model: {error}.", hint="Download the file again."
        ) from None
    if not pieces:
        raise InputError(f"{path} has no pieces.", hint="Download the file again.")
    return SentencePiece(tuple(pieces), bpe, prefix, collapse, rules)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    if not 1 <= kind <= 6:
        raise ValueError(f"the piece {text!r} has type {kind}")
    return Piece(text, score, kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an int, or the bytes of anything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"it ends at byte {len(data)}, inside of a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"it ends at byte {at}, inside of a number")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if not byte & 128:
            return value, at
