"""The parity gate: what is asked of every model, and what counts as the same answer.

Three questions are kept apart. *Faithful*: does the runtime, reading the artifact's bytes, compute
the function those bytes stand for? Judged without kernels of ours, against the oracle holding the
decoded weights, with a tolerance derived from f32 arithmetic; this proves graph, layout and runtime,
whatever the value type. *Kernels*: do ours compute the same, but for activations rounded to int8 where
the weights are integers? Judged against the same oracle by mean divergence. *Close*: how far did
rounding to the value type move the model? Judged against the oracle holding the merged weights.

A greedy token that differs from the oracle's fails the gate unless the oracle itself was undecided:
its own margin between the two best tokens at that step is no larger than the logit difference
observed up to it. Such a tie is reported, and `greedy_tokens_equal` is false all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from losa_deploy.oracle import Oracle, Question
from losa_deploy.parity import GreedyTrace, compare_greedy, compare_logits, greedy, logit_tolerance
from losa_deploy.recipe import VerifyRecipe
from losa_deploy.text import Tokenizer

MEAN_KL_LIMITS: Mapping[str, float] = {"f32": 1e-6, "f16": 1e-3, "i8": 0.05, "i4": 1.0}
"""Largest mean divergence (nats per token) from the merged model that passes as rounding.

f32 stores the same values; f16 and i8 move a sound model by less than a tenth of these. i4 without
training on its grid is a matter of quality, which the report states; beyond 1 nat it is broken.
"""
KERNEL_KL_LIMITS: Mapping[str, float] = {"f32": 1e-6, "f16": 1e-4, "i8": 0.05, "i4": 0.05}
"""Largest mean divergence that native kernels may add: a sound model moves by less than a tenth of it.

f16 for the sake of llama.cpp, which rounds its cache and what meets f16 weights to f16.
"""
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


@dataclass(frozen=True)
class Parity:
    """Exported against merged, in the real runtime. Numbers are None where a check before them failed."""

    ok: bool
    reasons: tuple[str, ...]
    """One line per failed check: tensor or prompt, found, expected."""
    max_abs_logit_difference: float | None = None
    """Runtime against the oracle with the merged weights."""
    greedy_tokens_equal: bool | None = None
    """Against the merged model, over all prompts; a tie makes this false but is no failure."""
    ties: tuple[str, ...] = ()
    decoded_logit_difference: float | None = None
    """Runtime without kernels of ours against the oracle with the artifact's own decoded weights.

    None, as the next two, if the model does not fit into memory in f32, which that takes.
    """
    decoded_logit_tolerance: float | None = None
    decoded_tokens_equal: bool | None = None
    kernel_kl: float | None = None
    """Mean divergence that the native kernels add; 0 if none are used."""
    mean_kl: float | None = None
    mean_kl_limit: float | None = None
    max_kl: float | None = None
    same_top_rate: float | None = None
    positions: int = 0
    prompts: int = 0
    tokens: int = 0
    largest_weight_error: float = 0.0
    """Largest absolute difference of a decoded weight from the merged one."""


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


def judge(
    actual: Answers,
    stock: Answers | None,
    exact: Answers,
    merged: Answers,
    questions: Questions,
    *,
    model: SparseModel,
    value_types: Sequence[str],
    weight_error: float,
) -> Parity:
    """The runtime's answers, with and without kernels, against oracles with decoded and merged weights.

    Without `stock` (None) kernels are judged together with what graph and runtime add.
    """
    faithful = compare_logits(exact.logits, (stock or actual).logits)
    kernel_kl = 0.0 if stock is actual else compare_logits(exact.logits, actual.logits).mean_kl
    kernel_limit = max(KERNEL_KL_LIMITS[value_type] for value_type in value_types)
    close = compare_logits(merged.logits, actual.logits)
    inner = max(columns for _, columns in model.linears.values())
    tolerance = logit_tolerance(faithful.largest_logit, model.checkpoint.block_count, inner)
    limit = max(MEAN_KL_LIMITS[value_type] for value_type in value_types)
    on_decoded = compare_traces("decoded", exact, stock or actual, questions)
    on_merged = compare_traces("merged", merged, actual, questions)
    difference = max(faithful.max_abs_logit_difference, on_decoded.difference)
    reasons = [*(on_decoded.failures if stock else ()), *on_merged.failures]
    if stock and not difference <= tolerance:
        reasons.append(
            f"logits: found a difference of {difference:.3g} from the decoded weights, "
            f"expected at most {tolerance:.3g}"
        )
    if not kernel_kl <= kernel_limit:
        reasons.append(
            f"kernels: found a mean divergence of {kernel_kl:.3g} nats from the decoded weights, "
            f"expected at most {kernel_limit:g}"
        )
    if not close.mean_kl <= limit:
        reasons.append(
            f"logits: found a mean divergence of {close.mean_kl:.3g} nats from the merged model, "
            f"expected at most {limit:g}"
        )
    return Parity(
        ok=not reasons,
        reasons=tuple(reasons),
        max_abs_logit_difference=_finite(max(close.max_abs_logit_difference, on_merged.difference)),
        greedy_tokens_equal=on_merged.equal,
        ties=on_merged.ties,
        decoded_logit_difference=_finite(difference) if stock else None,
        decoded_logit_tolerance=tolerance if stock else None,
        decoded_tokens_equal=on_decoded.equal if stock else None,
        kernel_kl=_finite(kernel_kl),
        mean_kl=_finite(close.mean_kl),
        mean_kl_limit=limit,
        max_kl=_finite(close.max_kl),
        same_top_rate=close.same_top_rate,
        positions=close.positions,
        prompts=len(questions.prompts),
        tokens=questions.steps,
        largest_weight_error=weight_error,
    )


@dataclass(frozen=True)
class TraceVerdict:
    """Greedy continuations of all prompts against one oracle."""

    failures: tuple[str, ...]
    ties: tuple[str, ...]
    difference: float
    """Largest logit difference along common histories."""

    @property
    def equal(self) -> bool:
        """Every token of every prompt."""
        return not (self.failures or self.ties)


def compare_traces(name: str, oracle: Answers, actual: Answers, questions: Questions) -> TraceVerdict:
    """Sort the prompts with different tokens into failures and ties; `name` is the oracle's."""
    failures: list[str] = []
    ties: list[str] = []
    gap = 0.0
    for prompt, expected, found in zip(questions.names, oracle.traces, actual.traces, strict=True):
        result = compare_greedy(expected, found)
        gap = max(gap, result.max_abs_logit_difference)
        if result.equal:
            continue
        step = result.first_difference
        line = (
            f"prompt {prompt!r}: found token {found.tokens[step]} at step {step}, expected "
            f"{expected.tokens[step]} as in the {name} model (its margin {result.margin:.3g}, "
            f"logit difference {result.max_abs_logit_difference:.3g})"
        )
        (ties if result.tie else failures).append(line)
    return TraceVerdict(tuple(failures), tuple(ties), gap)


def _finite(value: float) -> float | None:
    """Infinity (a NaN somewhere) has no JSON; the reasons name it."""
    return value if np.isfinite(value) else None
