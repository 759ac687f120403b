"""How long a text may be before it is split into tokens: what cannot fit is refused without that work."""

from __future__ import annotations

from losa_deploy.text.tokenizer import Tokenizer

SHRINK = 4
"""How much shorter a normalizer may make a text: NFKC turns 4 bytes into 1 at most (mathematical letters)."""
UNBOUNDED = 1 << 20
"""Bytes of a text where the context says nothing: it is unknown, or a token may stand for any text."""
STRANGE = "\ue000"
"""A character of the private use area, which no vocabulary has as a token."""


def text_bound(tokenizer: Tokenizer, context: int) -> int:
    """UTF-8 bytes above which no text fits into `context` tokens (0: unknown).

    It holds because every token stands for at most `longest_token` bytes of the normalized text, and the
    given text has at most `SHRINK` times as many. Two things could break it. Tokenizers that write
    any run of unknown characters as one token are recognized, and get `UNBOUNDED`. Spaces that a
    normalizer or a template strips are not: a text that is mostly such spaces may be refused though it fits.
    """
    if not context:
        return UNBOUNDED
    longest = longest_token(tokenizer)
    bound = context * longest * SHRINK
    text = STRANGE * 2 * longest
    strange = tokenizer.encode(text, special=False)
    return bound if len(strange) * longest >= len(text.encode()) else max(bound, UNBOUNDED)


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token.

    One is added because many tokenizers drop the space of the first token of a text. Parts of a
    character are decoded to U+FFFD, which has as many bytes or more.
    """
    texts = (tokenizer.decode([token], special=True) for token in range(tokenizer.size))
    return 1 + max((len(text.encode("utf-8", "replace")) for text in texts), default=1)
