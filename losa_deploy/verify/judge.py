"""What counts as the same answer.

Three questions are kept apart. *Faithful*: does the runtime, reading the artifact's bytes, compute
the function those bytes stand for? Judged without kernels of ours, against the oracle holding the
decoded weights, with a tolerance derived from f32 arithmetic; this proves graph, layout and runtime,
whatever the value type. *Kernels*: do ours compute the same, but for activations rounded to int8 where
the weights are integers? Judged against the same oracle by mean divergence. *Close*: how far did
rounding to the value type move the model? Judged against the oracle holding the merged weights.

A greedy token that differs from the oracle's fails the gate unless the oracle itself was undecided:
its own margin between the two best tokens at that step is no larger than √2 times the logit difference
observed up to it (the errors of two logits are independent). Such a tie is reported, and
`greedy_tokens_equal` is false all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from losa_deploy.layouts import VALUE_TYPES
from losa_deploy.model import SparseModel
from losa_deploy.verify.distance import compare_greedy, compare_logits, logit_tolerance
from losa_deploy.verify.questions import Answers, Questions


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
    kernel_limit = max(VALUE_TYPES[value_type].kernel_kl for value_type in value_types)
    close = compare_logits(merged.logits, actual.logits)
    inner = max(columns for _, columns in model.linears.values())
    tolerance = logit_tolerance(faithful.largest_logit, model.checkpoint.block_count, inner)
    limit = max(VALUE_TYPES[value_type].rounding_kl for value_type in value_types)
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
