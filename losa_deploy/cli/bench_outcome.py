"""What `losa-deploy bench PATH --peers` says in the end: table or document, verdict, picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.console import Console, table
from losa_deploy.errors import UsageError

if TYPE_CHECKING:
    from losa_deploy.benchmarks.synthetic.peers import Contender

RESULTS, TABLE, PLOT = "results.json", "table.md", "quality.svg"
"""Files of `--output`."""
DENSE_ZEROS = 0.3
"""Share of zeros that a dense weight may have: one that comes from a file of few bits has some."""


def check_outputs(args: argparse.Namespace) -> None:
    """Raise `UsageError` for a picture that is not SVG, before anything is measured."""
    if args.plot is not None and args.plot.suffix.lower() != ".svg":
        raise UsageError(
            f"--plot {args.plot} is no .svg file, and models are drawn as SVG.",
            hint=f"E.g. --plot {args.plot.with_suffix('.svg')}.",
        )


def publish(
    contenders: Sequence[Contender],
    missing: Mapping[str, str],
    dense: Path,
    workload: Mapping[str, object],
    args: argparse.Namespace,
    console: Console,
) -> None:
    """Write the result, and the files of `--plot` and `--output`.

    `missing` is peer → why it was not measured, `dense` the file that peers are made of. If that is pruned
    itself, its quantizations are no rivals, and the verdict begins with that.
    """
    from losa_deploy.benchmarks.contest import entries, quality_plots
    from losa_deploy.benchmarks.contest_verdict import verdict
    from losa_deploy.benchmarks.document import bench_document
    from losa_deploy.benchmarks.gguf_sizes import zero_share

    for name, reason in missing.items():
        console.warn(f"{name} was not measured: {reason}")
    records = [{**c.record(), "runtime": c.runtime.name} for c in contenders]
    document = bench_document(records, workload)
    document["not_measured"] = [{"name": name, "reason": reason} for name, reason in missing.items()]
    found = verdict(entries(contenders))
    zeros = zero_share(dense)
    if zeros > DENSE_ZEROS:
        doubt = f"Peers were made of {dense}, {zeros:.0%} zeros: of a pruned model, not of the dense one."
        console.warn(doubt)
        found["lines"] = [doubt, *found["lines"]]
    document["verdict"] = found
    header, rows = _header(workload), [_row(contender) for contender in contenders]
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        args.plot.write_text(quality_plots(contenders), "utf-8")
        console.info(f"Wrote {args.plot}")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        files = {
            RESULTS: json.dumps(document, indent=1, allow_nan=False) + "\n",
            TABLE: _markdown(header, rows, document, contenders),
            PLOT: quality_plots(contenders),
        }
        for name, text in files.items():
            (args.output / name).write_text(text, "utf-8")
        console.info(f"Wrote {', '.join(files)} to {args.output}")
    if args.json:
        console.result_json(document)
        return
    console.result(table(header, rows))
    for line in (*_why_no_perplexity(contenders), *_sentences(document)):
        console.result(line)


def _header(workload: Mapping[str, object]) -> tuple[str, ...]:
    decode, prefill = (f"{kind}{workload[f'{name}_tokens']} tok/s" for kind, name in _RATES)
    return ("model", "runtime", "MB", "perplexity", decode, prefill, "peak RSS MB")


_RATES = (("tg", "decode"), ("pp", "prefill"))


def _row(contender: Contender) -> tuple[str, ...]:
    from losa_deploy.benchmarks.contest import spread

    record, quality = contender.record(), contender.quality
    return (
        contender.name,
        contender.runtime.name,
        f"{contender.bytes / 1e6:,.1f}",
        f"{quality.perplexity:.2f} ± {quality.stderr:.2f}" if quality else "not measured",
        f"{float(str(record['decode_tokens_per_second'])):.1f} ± {100 * spread(contender):.0f} %",
        f"{float(str(record['prefill_tokens_per_second'])):.1f}",
        f"{contender.footprint.peak_rss_bytes / 1e6:,.0f}" if contender.footprint else "",
    )


def _why_no_perplexity(contenders: Sequence[Contender]) -> list[str]:
    return [f"{c.name}: no perplexity, {c.quality_missing}" for c in contenders if c.quality_missing]


def _sentences(document: Mapping[str, object]) -> list[str]:
    found = document["verdict"]
    lines = found["lines"] if isinstance(found, Mapping) else ()
    return [str(line) for line in lines]


def _markdown(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    document: Mapping[str, object],
    contenders: Sequence[Contender],
) -> str:
    """`table.md`: the verdict, the table, how it was measured, what is missing."""
    from losa_deploy.benchmarks.report.render import markdown_table

    quality = next((c.quality for c in contenders if c.quality), None)
    on = f" on {quality.tokens} tokens of the built-in text in windows of {quality.window}" if quality else ""
    how = (
        f"Perplexity{on}, ± one standard error over tokens; decode speed: median, ± one standard deviation "
        "of the samples; all models in turns; peak RSS of a fresh process each."
    )
    absent = document["not_measured"]
    gone = [f"- {m['name']}: {m['reason']}" for m in absent] if isinstance(absent, list) else []
    gone += [f"- {line}" for line in _why_no_perplexity(contenders)]
    lines = [
        *[f"- {line}" for line in _sentences(document)],
        "",
        *markdown_table(header, rows),
        "",
        how,
        "",
        f"![Quality against speed and bytes]({PLOT})",
        *(["", "Not measured:", "", *gone] if gone else []),
    ]
    return "\n".join(lines) + "\n"
