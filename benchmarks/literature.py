"""Perplexity as the literature computes it, and the distance from a dense model on the same positions.

The text becomes tokens once, as a whole, with the tokens that the tokenizer puts around a text: for a
Llama one BOS at the very start, for a GPT-2 tokenizer none. It is cut into windows of the same length
that do not overlap; the tail that fills no window is left out. A window is run from an empty cache and
its first token is not scored, so that n tokens give n - 1 predictions. Perplexity is exp of the mean
negative log-likelihood of all predictions.

Logits of one window are all that is held: window · vocabulary · 4 bytes, twice that with a dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from losa_deploy.errors import InputError
from losa_deploy.interfaces import Session
from losa_deploy.progress import Progress, no_progress
from losa_deploy.text.tokenizer import Tokenizer
from losa_deploy.verify.distance import ROWS, Floats, Logits, log_softmax

from .accuracy import Mean, Perplexity, mean_of_windows, negative_log_likelihoods, summarize

LARGEST_LOSS = 700.0
"""Nats per token from which on exp overflows; a uniform guess costs about 12."""


@dataclass(frozen=True)
class TextWindows:
    """A text cut as the literature does."""

    windows: tuple[tuple[int, ...], ...]
    text_tokens: int
    """Tokens of the whole text, of which the windows may be a part."""
    bos: bool
    """The first token is the tokenizer's BOS; no later window has one of its own."""

    @property
    def length(self) -> int:
        """Tokens of a window; all have the same number."""
        return len(self.windows[0])


@dataclass(frozen=True)
class DenseDistance:
    """How far a model is from its dense original, over the scored positions."""

    dense: Perplexity
    kl: Mean
    """KL(dense || model) in nats."""
    same_top: Mean
    """Share of positions with the same most likely token."""


def literature_windows(tokenizer: Tokenizer, text: str, window: int, max_tokens: int) -> TextWindows:
    """The first `max_tokens` tokens of `text` in whole windows of `window` tokens, at least one.

    A text that fills no window is one short window. Raises `InputError` if it has fewer than two
    tokens, which leave nothing to predict.
    """
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise InputError(
            f"The evaluation text has {len(tokens)} tokens, too few to score one.",
            hint="Give a longer text.",
        )
    bos = tokens[0] == tokenizer.bos_id
    count = min(len(tokens) // window, max(1, max_tokens // window))
    if count == 0:
        return TextWindows((tuple(tokens),), len(tokens), bos)
    pieces = (tuple(tokens[i * window : (i + 1) * window]) for i in range(count))
    return TextWindows(tuple(pieces), len(tokens), bos)


def score_text(
    session: Session, text: TextWindows, dense: Session | None = None, progress: Progress = no_progress
) -> tuple[Perplexity, DenseDistance | None]:
    """Perplexity of `session`, and its distance from `dense` if there is one; window by window.

    Raises `InputError` if a model computes logits that are no finite numbers, or if the two
    vocabularies differ in size.
    """
    if dense is not None and dense.vocab_size != session.vocab_size:
        raise InputError(
            f"The model has a vocabulary of {session.vocab_size} tokens, the dense one of "
            f"{dense.vocab_size}: their predictions cannot be compared.",
            hint="Give --dense the model that this one was made from.",
        )
    losses: list[Floats] = []
    compared: list[tuple[Floats, Floats, Floats]] = []
    for number, tokens in enumerate(text.windows):
        progress(number, len(text.windows), f"window of {len(tokens)} tokens")
        logits = _finite(session.logits(tokens)[:-1], number, "model")
        losses.append(_likely(negative_log_likelihoods(logits, tokens), number, "model"))
        if dense is not None:
            expected = _finite(dense.logits(tokens)[:-1], number, "dense model")
            compared.append(compare_window(expected, logits, tokens))
            _likely(compared[-1][0], number, "dense model")
    progress(len(text.windows), len(text.windows), "done")
    found = summarize(losses, text.length)
    if dense is None:
        return found, None
    of_dense, kl, same = zip(*compared, strict=True)
    distance = DenseDistance(summarize(of_dense, text.length), mean_of_windows(kl), mean_of_windows(same))
    return found, distance


def compare_window(dense: Logits, model: Logits, tokens: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Per scored position [n]: loss of the dense model, KL(dense || model), 1 where the top tokens agree.

    `dense` and `model` are logits [n, vocab] for tokens[1 : n + 1]; losses and KL are in nats.
    """
    targets = np.asarray(tokens[1:])
    loss, kl = np.empty(len(dense), np.float64), np.empty(len(dense), np.float64)
    for start in range(0, len(dense), ROWS):
        rows = slice(start, min(start + ROWS, len(dense)))
        p, q = log_softmax(dense[rows]), log_softmax(model[rows])
        loss[rows] = -p[np.arange(len(p)), targets[rows]]
        kl[rows] = (np.exp(p) * (p - q)).sum(axis=-1)
    same: Floats = (dense.argmax(-1) == model.argmax(-1)).astype(np.float64)
    return loss, np.maximum(kl, 0.0), same


def _finite(logits: Logits, number: int, name: str) -> Logits:
    if not np.isfinite(logits).all():
        raise InputError(
            f"The {name} computes logits in window {number + 1} that are no finite numbers.",
            hint="Check the model with `losa-deploy verify`.",
        )
    return logits


def _likely(losses: Floats, number: int, name: str) -> Floats:
    if losses.mean() > LARGEST_LOSS:
        raise InputError(
            f"The {name} loses {losses.mean():.3g} nats per token in window {number + 1}, where a uniform "
            "guess loses about 12: it is no language model.",
            hint="Check the model with `losa-deploy verify`.",
        )
    return losses
