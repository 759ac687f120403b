"""The report as people read it: rows for the terminal and the card, and `report.md`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..training import training_section

if TYPE_CHECKING:
    from .document import ModelNumbers, Report

TableRow = tuple[str, ...]
"""Label and one cell per model; empty where a number does not apply."""
CardRow = tuple[str, str, str, str]
"""Label, dense, merged, exported."""
BAR_WIDTH = 30
SPEED_WORDS = {True: "faster", False: "not faster", None: "speed not compared"}
FULL, EMPTY = "█", "░"


def table_header(report: Report) -> TableRow:
    """Names of the columns of `terminal_rows`."""
    rival = measured_rival(report)
    return ("", "dense", "merged", "exported", *([rival[0]] if rival else []))


def measured_rival(report: Report) -> tuple[str, ModelNumbers] | None:
    """Its name and numbers, None if it was not measured."""
    rival = report.rival
    return (rival.kind.upper(), rival.numbers) if rival and rival.numbers else None


def terminal_rows(report: Report) -> list[TableRow]:
    """At most 13 rows: numbers side by side, then proof, parity and verdict under the artifact."""
    smaller = "smaller" if report.verdict.smaller else "not smaller"
    faster = SPEED_WORDS[report.verdict.faster]
    rows: list[TableRow] = [
        *card_rows(report),
        ("merge proof", "", proof_line(report), ""),
        ("parity", "", "", parity_line(report)),
        ("verdict", "", "", f"{smaller}, {faster}"),
    ]
    rival = measured_rival(report)
    if rival is None:
        return rows
    cells = {label: show(rival[1]) for label, show in NUMBERS.items()}
    return [(*row, cells.get(row[0], "")) for row in rows]


def card_rows(report: Report) -> list[CardRow]:
    """The measured numbers of the three models."""
    models = (report.dense, report.merged, report.exported)
    rows: list[CardRow] = []
    for label, show in NUMBERS.items():
        dense, merged, exported = map(show, models)
        rows.append((label, dense, merged, exported))
    achieved = f"{report.sparsity.achieved:.2%}"
    rows.insert(2, ("sparsity achieved", "", achieved, achieved))
    return rows


def perplexity_cell(m: ModelNumbers) -> str:
    """Perplexity with its standard error."""
    if m.perplexity is None:
        return ""
    return f"{m.perplexity:.2f} ± {m.perplexity_stderr or 0.0:.2f}"


def number(value: float | None, form: str) -> str:
    """A number, or nothing where it does not apply."""
    return "" if value is None else form.format(value)


NUMBERS: Mapping[str, Callable[[ModelNumbers], str]] = {
    "size": lambda m: f"{m.size_bytes / 1e6:.1f} MB",
    "bits per block weight": lambda m: f"{m.bits_per_weight:.2f}",
    "perplexity": perplexity_cell,
    "decode tokens/s": lambda m: number(m.decode_tokens_per_second, "{:.1f}"),
    "prefill tokens/s": lambda m: number(m.prefill_tokens_per_second, "{:.1f}"),
    "peak RSS": lambda m: "" if m.peak_rss_bytes is None else f"{m.peak_rss_bytes / 1e6:.0f} MB",
    "load": lambda m: number(m.load_seconds, "{:.2f} s"),
}
"""Label of a row → what it shows of a model."""


def proof_line(report: Report) -> str:
    """The merge proof in a few words."""
    proof = report.merge_proof
    if proof is None:
        return "none"
    word = "ok" if proof.ok else "FAILED"
    return f"{word}, Δlogit {proof.max_abs_logit_difference:.1e}"


def parity_line(report: Report) -> str:
    """Parity in a few words."""
    parity = report.parity
    if parity is None:
        return "not checked"
    word = "ok" if parity.ok else "FAILED"
    tokens = "tokens equal" if parity.greedy_tokens_equal else f"{len(parity.ties)} tie(s)"
    return f"{word}, {tokens}, Δlogit {parity.max_abs_logit_difference:.1e}"


def bar(value: float, top: float) -> str:
    """A text bar of `BAR_WIDTH` cells, full at `top`."""
    filled = round(BAR_WIDTH * min(1.0, max(0.0, value / top))) if top > 0 else 0
    return FULL * filled + EMPTY * (BAR_WIDTH - filled)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A pipe table, first column left, others right."""
    line = "|" + "|".join([" --- ", *[" ---: "] * (len(header) - 1)]) + "|"
    return ["| " + " | ".join(header) + " |", line, *("| " + " | ".join(r) + " |" for r in rows)]


def conditions(report: Report) -> str:
    """How the numbers were taken, in one paragraph."""
    e, w = report.evaluation, report.workload
    samples = min(len(s.decode_tokens_per_second) for s in report.samples.values())
    cut = ""
    if e.windows_asked is not None and e.windows_asked > e.windows:
        cut = f" (of {e.windows_asked}: more would take longer than --verify-minutes allows)"
    return (
        f"Perplexity on the text `{e.text}`: {e.tokens} scored tokens in {e.windows} windows of "
        f"{e.window}{cut}, ± one standard error over tokens. Speed: median of {samples} samples after "
        f"{w.warmup} warm-up, the models in turns in shuffled order, prefill of {w.prompt_tokens} and decode "
        f"of {w.decode_tokens} tokens, {w.threads} threads. Peak RSS and load time: a fresh process each."
    )


def markdown(report: Report) -> str:
    """`report.md`."""
    lines = [
        f"# {report.model}: {report.sparsity.achieved:.0%} sparse, {report.format}",
        "",
        *[f"- {line}" for line in report.verdict.lines],
        "",
        "## Numbers",
        "",
        *markdown_table(table_header(report), terminal_rows(report)),
        "",
        conditions(report),
        "",
        *_rival_section(report),
        *_parity_section(report),
        *_blocks_section(report),
        *training_section(report.training),
        *_samples_section(report),
        *_environment_section(report),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _rival_section(report: Report) -> list[str]:
    rival = report.rival
    if rival is None:
        return []
    name = rival.kind.upper() if rival.kind != "none" else "A dense 4-bit file"
    if rival.numbers is None:
        return ["## Rival", "", f"- {name} of the same model: not measured, {rival.reason}", ""]
    made = (
        f"- {name} of the same dense model, made by llama.cpp and measured in `{rival.numbers.runtime}`, "
        "on the same windows and in turns with the others"
    )
    loss = (
        f"- loss of the export minus that of {name} over the same tokens: {rival.loss_difference:+.4f} ± "
        f"{rival.loss_difference_stderr:.4f} nats per token"
    )
    return ["## Rival", "", made, loss, f"- {report.verdict.lines[-1]}", ""]


def _parity_section(report: Report) -> list[str]:
    parity = report.parity
    if parity is None:
        return []
    logits = f"- largest logit difference: {parity.max_abs_logit_difference:.3g}; without native kernels, "
    if parity.decoded_logit_difference is None:
        logits += "in f32, the model does not fit into memory and was not run"
    else:
        logits += (
            f"against the artifact's own decoded weights {parity.decoded_logit_difference:.3g} (f32 "
            f"arithmetic allows {parity.decoded_logit_tolerance:.3g})"
        )
    kernels = (
        f"- native kernels (int8 activations where weights are integers) add a mean divergence of "
        f"{parity.kernel_kl:.3g} nats"
        if parity.kernel_kl
        else "- native kernels: none used, or no divergence added"
    )
    closeness = (
        f"- mean divergence {parity.mean_kl:.3g} nats, same most likely token at "
        f"{parity.same_top_rate:.1%} of {parity.positions} positions"
    )
    tokens = f"- greedy tokens {'equal' if parity.greedy_tokens_equal else 'differ only where undecided'}"
    ties = [f"  - {tie}" for tie in parity.ties]
    return ["## Parity of exported and merged", "", logits, kernels, closeness, tokens, *ties, ""]


def _blocks_section(report: Report) -> list[str]:
    lines: list[str] = []
    blocks = report.blocks
    for title, values, form in (
        ("Sparsity per block", blocks.sparsity, "{:.1%}"),
        ("Adapter rank per block", blocks.rank, "{:.0f}"),
        ("Relative output error per block", blocks.error, "{:.4f}"),
    ):
        if not any(values):
            continue
        top = 1.0 if title.startswith("Sparsity") else max(values)
        lines += [f"## {title}", "", "```"]
        lines += [f"{i:3d} {bar(v, top)} {form.format(v)}" for i, v in enumerate(values)]
        lines += ["```", ""]
    return lines


def _samples_section(report: Report) -> list[str]:
    rows = [
        (name, kind, ", ".join(f"{v:.1f}" for v in values))
        for name, sample in report.samples.items()
        for kind, values in (
            ("prefill", sample.prefill_tokens_per_second),
            ("decode", sample.decode_tokens_per_second),
        )
    ]
    return ["## Samples, tokens/s", "", *markdown_table(("model", "phase", "samples"), rows), ""]


def _environment_section(report: Report) -> list[str]:
    env = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in env.versions.items())
    timings = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in report.timings.items())
    return [
        "## Machine and software",
        "",
        f"- {env.line()}; governor {env.governor or 'unknown'}; features {' '.join(env.flags) or 'unknown'}",
        f"- Python {env.python}; {versions}" + (f"; commit {env.commit}" if env.commit else ""),
        f"- stages: {timings}",
        f"- made {report.created}",
        "",
    ]
