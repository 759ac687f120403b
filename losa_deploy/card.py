"""The model card: `README.md`, rendered from the manifest and the report's numbers.

What stands between the two markers belongs to the reader and survives a re-run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from losa_deploy.manifest import Manifest

CARD_FILE = "README.md"
BEGIN = "<!-- losa-deploy: your own text starts here and survives a re-run -->"
END = "<!-- losa-deploy: your own text ends here -->"


@dataclass(frozen=True)
class FormatNotes:
    """What a card says about the format of the files."""

    library: str
    """The hub's name of the library that opens them."""
    needs: str
    """Sentences on what opens them."""
    limits: tuple[str, ...] = ()
    """Sentences on what to expect there."""


PLAIN = FormatNotes(library="transformers", needs="It opens in transformers like any other model.")
"""Of a merged folder."""


@dataclass(frozen=True)
class CardNumbers:
    """What a card shows of a report."""

    rows: tuple[tuple[str, str, str, str], ...]
    """Label, dense, merged, exported."""
    machine: str
    conditions: str
    evaluation: str
    verdict: tuple[str, ...]
    perplexity: float | None = None


def write_card(
    folder: Path,
    manifest: Manifest,
    numbers: CardNumbers | None,
    notes: FormatNotes = PLAIN,
    previous: Path | None = None,
) -> None:
    """Write `README.md` into `folder`, keeping the reader's own text of an earlier card.

    `notes` are about the format, see `Exporter.card`. The earlier card is the one in `folder`, else the one
    in `previous` (the output to be replaced).
    """
    own = ""
    for place in (folder, previous):
        if place is not None and not own:
            try:
                own = own_text((place / CARD_FILE).read_text("utf-8"))
            except (OSError, UnicodeDecodeError):
                continue
    (folder / CARD_FILE).write_text(render_card(manifest, numbers, notes, own), "utf-8")


def own_text(card: str) -> str:
    """The text between the markers; empty if they are missing."""
    _, begin, rest = card.partition(BEGIN)
    text, end, _ = rest.partition(END)
    return text.strip("\n") if begin and end else ""


def render_card(
    manifest: Manifest, numbers: CardNumbers | None, notes: FormatNotes = PLAIN, own: str = ""
) -> str:
    """The whole card."""
    sections = [
        _head(manifest, notes),
        f"# {_title(manifest)}",
        _done(manifest),
        _measured(numbers) if numbers else "## Numbers\n\nNot measured.",
        _use(notes),
        _limits(notes),
        _provenance(manifest),
        f"{BEGIN}\n{own}\n{END}" if own else f"{BEGIN}\n{END}",
    ]
    return "\n\n".join(sections) + "\n"


def _head(manifest: Manifest, notes: FormatNotes) -> str:
    """YAML front matter as the hub reads it; a field without a known value is left out."""
    head: dict[str, object] = {}
    if "/" in manifest.source.id and not Path(manifest.source.id).is_absolute():
        head["base_model"] = manifest.source.id
        head["base_model_relation"] = "quantized"
    if manifest.source.license:
        head["license"] = manifest.source.license
    head["library_name"] = notes.library
    head["pipeline_tag"] = "text-generation"
    head["tags"] = ["losa", "sparse", manifest.format]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _title(manifest: Manifest) -> str:
    name = manifest.source.id.rstrip("/").rpartition("/")[2] or "model"
    return f"{name}, {manifest.sparsity_achieved:.0%} sparse ({manifest.format})"


def _done(manifest: Manifest) -> str:
    """What was done, from the recipe."""
    recipe = manifest.recipe
    pattern = "" if recipe.sparsity.pattern == "unstructured" else f", pattern {recipe.sparsity.pattern}"
    pruned = (
        f"- `{manifest.source.id}` pruned to {manifest.sparsity_achieved:.2%} zeros in its block linears "
        f"({recipe.prune.method}, rates by {recipe.allocation.method}{pattern}, "
        f"{recipe.schedule.steps} steps)"
    )
    trained = "; ".join(phase.summary for phase in recipe.phases) or "nothing"
    lines = [
        pruned,
        f"- trained: {trained}; every zero kept, merged without loss{_proof(manifest)}",
        f"- stored as {_storage(manifest)}",
        f"- preset `{recipe.preset}`, seed {recipe.seed}; the whole recipe is in `losa.json`",
    ]
    return "## What was done\n\n" + "\n".join(lines)


def _proof(manifest: Manifest) -> str:
    proof = manifest.merge_proof
    if proof is None:
        return ""
    word = "passed" if proof.ok else "FAILED"
    return f" (proof {word}: largest logit difference {proof.max_abs_logit_difference:.1e})"


def _storage(manifest: Manifest) -> str:
    """Layouts and value types in use, with the mean bits per weight of the block linears."""
    counts: dict[str, int] = {}
    for record in manifest.linears:
        kind = f"{record.layout} {record.value_type}"
        counts[kind] = counts.get(kind, 0) + 1
    kinds = ", ".join(f"{kind} ({count} linears)" for kind, count in sorted(counts.items()))
    return f"{kinds}: {mean_bits(manifest):.2f} bits per block weight"


def mean_bits(manifest: Manifest) -> float:
    """Stored bits per dense position over all block linears."""
    positions = sum(_positions(record.shape) for record in manifest.linears)
    return 8.0 * sum(record.bytes for record in manifest.linears) / max(1, positions)


def _positions(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _measured(numbers: CardNumbers) -> str:
    lines = ["| | dense | merged | exported |", "| --- | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(row) + " |" for row in numbers.rows]
    verdict = "\n".join(f"- {line}" for line in numbers.verdict)
    return (
        "## Numbers\n\n"
        + "\n".join(lines)
        + f"\n\nMeasured on {numbers.machine}; {numbers.conditions}. Perplexity ± one standard error: "
        f"{numbers.evaluation}.\n\n{verdict}"
    )


def _use(notes: FormatNotes) -> str:
    return (
        "## How to run\n\n```sh\npip install losa-deploy\nlosa-deploy chat -m .\n```\n\n"
        f"## What it needs\n\n{notes.needs}"
    )


def _limits(notes: FormatNotes) -> str:
    lines = [
        "- Pruning costs quality: the perplexities above say how much, on one text; tasks may lose more.",
        "- The limits, biases and licence terms of the source model apply to this one.",
        *(f"- {line}" for line in notes.limits),
    ]
    return "## Limits\n\n" + "\n".join(lines)


def _provenance(manifest: Manifest) -> str:
    revision = f" at revision `{manifest.source.revision}`" if manifest.source.revision else ""
    lines = [f"- source: `{manifest.source.id}`{revision}"]
    lines += [f"  - `{name}` sha256 `{digest}`" for name, digest in sorted(manifest.source.files.items())]
    if manifest.calibration_sha256:
        lines.append(f"- calibration tokens: sha256 `{manifest.calibration_sha256}`")
    lines.append(f"- made with losa-deploy {manifest.tool_version}; hashes of all files are in `losa.json`")
    return "## Provenance\n\n" + "\n".join(lines)
