"""What `losa-deploy evaluate` says of its measurements, as JSON keys and as lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from losa_deploy.benchmarks.accuracy import Perplexity
    from losa_deploy.benchmarks.literature import DenseDistance, TextWindows
    from losa_deploy.benchmarks.tasks import TaskMean, TaskResult

Table = list[tuple[str, str]]


@dataclass(frozen=True)
class Measured:
    """Perplexity on one text."""

    name: str
    joined: bool
    """The text came in rows."""
    text: TextWindows
    found: Perplexity
    distance: DenseDistance | None
    dense: str
    dense_runtime: str


def text_document(m: Measured) -> dict[str, object]:
    """Keys of `losa.evaluate/2` that a text brings."""
    of_windows = m.found.stderr_windows
    document: dict[str, object] = {
        "text": m.name,
        "joining": "rows joined by a blank line" if m.joined else "as it is",
        "bos": "once, at the start" if m.text.bos else "none",
        "tokens_in_text": m.text.text_tokens,
        "window": m.found.window,
        "windows": m.found.windows,
        "tokens": m.found.tokens,
        "perplexity": m.found.perplexity,
        "perplexity_stderr": m.found.error,
        "stderr_over": "tokens" if of_windows is None else "windows",
        "perplexity_stderr_windows": of_windows,
        "perplexity_stderr_tokens": m.found.stderr,
    }
    if m.distance is None:
        return document
    dense = m.distance.dense
    return {
        **document,
        "dense": m.dense,
        "dense_runtime": m.dense_runtime,
        "dense_perplexity": dense.perplexity,
        "dense_perplexity_stderr": dense.error,
        "kl_to_dense": m.distance.kl.value,
        "kl_to_dense_stderr": m.distance.kl.stderr,
        "same_top_to_dense": m.distance.same_top.value,
        "same_top_to_dense_stderr": m.distance.same_top.stderr,
    }


def text_lines(m: Measured) -> Table:
    """The same to read."""
    found, over = m.found, "tokens" if m.found.stderr_windows is None else "windows"
    lines = [("perplexity", f"{found.perplexity:.3f} ± {found.error:.3f} (standard error over {over})")]
    if m.distance is not None:
        kl, same = m.distance.kl, m.distance.same_top
        lines += [
            ("dense", f"{m.distance.dense.perplexity:.3f} ({m.dense} in {m.dense_runtime})"),
            ("KL to dense", f"{kl.value:.5f} ± {kl.stderr:.5f} nats"),
            ("same top token", f"{same.value:.2%} ± {same.stderr:.2%}"),
        ]
    start = "one BOS at the start" if m.text.bos else "no BOS"
    used = f"{found.windows} windows of {found.window} of its {m.text.text_tokens} tokens, {start}"
    return [*lines, ("text", f"{m.name}: {used}; {found.tokens} predictions")]


def accuracy_cell(found: TaskResult | TaskMean) -> str:
    """Accuracies in percent with their standard errors."""

    def cell(value: float, error: float | None) -> str:
        return f"{value:.2%}" + ("" if error is None else f" ± {error:.2%}")

    text = f"acc {cell(found.acc, found.acc_stderr)}"
    if found.acc_norm is None:
        return text
    return f"{text}, acc_norm {cell(found.acc_norm, found.acc_norm_stderr)}"
