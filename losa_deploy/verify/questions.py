"""What is asked of every model that is verified, and what a session or an oracle says to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from losa_deploy.attention import attention_windows, original_context
from losa_deploy.errors import InputError
from losa_deploy.interfaces import Session
from losa_deploy.model import SparseModel
from losa_deploy.recipe import VerifyRecipe
from losa_deploy.text.tokenizer import Tokenizer
from losa_deploy.verify.distance import GreedyTrace, greedy
from losa_deploy.verify.oracle import Oracle, Question

QUICK_WINDOW = 128
FULL_TOKENS = 1024
"""Tokens of running text scored: one window at level `quick`, all windows in so many at `full`."""
BEYOND = 32
"""Tokens by which one more sequence outgrows every window of the attention."""
STEPPED = 16
"""Of its tokens, how many are read one by one; the others are its prompt."""
LONGEST_ORIGINAL = 4096
"""A scaled context is outgrown too if the original one was shorter than this.

What a long sequence costs: 4,112 tokens of the 135M model take torch a minute on two busy cores and
2 GB, and each of the four sessions reads them once. Of the prompt's logits only the last are kept.
"""


def verification_prompts() -> tuple[str, ...]:
    """The shipped sentence starts, each with a natural continuation."""
    text = (resources.files("losa_deploy") / "data" / "prompts.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


def evaluation_text(source: str) -> str:
    """`builtin` or the contents of a UTF-8 file; raises `InputError` if it cannot be read."""
    if source == "builtin":
        return (resources.files("losa_deploy") / "data" / "evaluation.txt").read_text("utf-8")
    try:
        text = Path(source).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read the evaluation text {source}: {error}.",
            hint="Give a UTF-8 text file, or leave the key verify.text at `builtin`.",
        ) from None
    if not text.strip():
        raise InputError(f"The evaluation text {source} is empty.", hint="Give a file with some text.")
    return text


@dataclass(frozen=True)
class Questions:
    """What every model is asked: token sequences to score, prompts to continue greedily."""

    sequences: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    steps: int
    long: tuple[int, ...] = ()
    """A sequence that outgrows every window of the attention; empty if no sequence can."""

    @classmethod
    def make(cls, model: SparseModel, recipe: VerifyRecipe, tokenizer: Tokenizer) -> Questions:
        longest = model.config.get("max_position_embeddings", 1 << 30)
        context = longest if isinstance(longest, int) else 1 << 30
        width = min(recipe.window if recipe.level == "full" else min(QUICK_WINDOW, recipe.window), context)
        names = verification_prompts()
        prompts = [tuple(tokenizer.encode(p))[:context] for p in names]
        text = tokenizer.encode(evaluation_text(recipe.text))
        scored = text[: FULL_TOKENS if recipe.level == "full" else width]
        windows = [tuple(scored[start : start + width]) for start in range(0, len(scored), width)]
        chosen = slice(0, recipe.prompts)
        steps = max(1, min(recipe.tokens, context - max(map(len, prompts))))
        reach = longest_reach(model.config)
        length = min(reach + BEYOND, context) if reach else 0
        long = tuple(islice(cycle(text), length))
        return cls((*prompts, *windows), tuple(prompts[chosen]), names[chosen], steps, long)


def longest_reach(config: Mapping[str, object]) -> int:
    """The longest sequence that is too short to tell windows and scaled positions from others; or 0."""
    windows = [window for window in attention_windows(config) if window is not None]
    original = original_context(config) or 0
    return max([*windows, original if original < LONGEST_ORIGINAL else 0])


@dataclass(frozen=True)
class Answers:
    """What one model said: logits per sequence, a greedy trace per prompt."""

    logits: tuple[NDArray[np.float32], ...]
    traces: tuple[GreedyTrace, ...]


def ask(session: Session, questions: Questions) -> Answers:
    """Ask one session everything and close it, so that one model is in memory at a time."""
    try:
        logits = tuple(session.logits(sequence) for sequence in questions.sequences)
        if questions.long:
            logits = (*logits, _stepped(session, questions.long))
        traces = tuple(greedy(session, prompt, questions.steps) for prompt in questions.prompts)
    finally:
        session.close()
    return Answers(logits, traces)


def examine(oracle: Oracle, questions: Questions, said: Answers, *, threads: int) -> Answers:
    """What an oracle says to the same questions, in one pass through its blocks.

    It continues prompts as far as `said` does, always from the tokens chosen there: up to and including the
    first token that it would not have chosen, which is all that is compared, this is its own continuation.
    """
    asked = [Question.whole(sequence) for sequence in questions.sequences]
    if questions.long:
        asked.append(Question(questions.long, min(len(questions.long), 1 + STEPPED)))
    for prompt, trace in zip(questions.prompts, said.traces, strict=True):
        asked.append(Question((*prompt, *trace.tokens[:-1]), len(trace.tokens)))
    found = list(oracle.answers(asked, threads=threads))
    split = len(found) - len(questions.prompts)
    return Answers(tuple(found[:split]), tuple(map(GreedyTrace.of, found[split:])))


def _stepped(session: Session, tokens: tuple[int, ...]) -> NDArray[np.float32]:
    """Logits [1 + steps, vocab] after the prompt part of a sequence and after each token that follows."""
    split = max(1, len(tokens) - STEPPED)
    return np.stack([session.prefill(tokens[:split]), *(session.step(token) for token in tokens[split:])])
