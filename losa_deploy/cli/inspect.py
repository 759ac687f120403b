"""`losa-deploy inspect`: how every tensor of a folder is stored."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.console import Console, table

if TYPE_CHECKING:
    from losa_deploy.manifest import Manifest, TensorRecord


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="folder written by merge or export, or GGUF file"
    )


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.manifest import Manifest

    if args.path.is_file():
        _file(args, console)
        return
    manifest = Manifest.read(args.path)
    if args.json:
        console.result_json(document(manifest, args.path))
        return
    console.result(table((), [(key, value) for key, value in _head(manifest, args.path)]))
    console.result("")
    header = ("tensor", "shape", "layout", "values", "sparsity", "bytes", "bits/weight", "reason")
    console.result(table(header, [_row(t) for t in (*manifest.linears, *manifest.other_tensors)]))


def _file(args: argparse.Namespace, console: Console) -> None:
    """What a single file says of itself."""
    from losa_deploy.cli import inspect_file

    found = inspect_file.described(args.path)
    if args.json:
        console.result_json(inspect_file.document(found, args.path))
        return
    console.result(table((), inspect_file.rows(found, args.path)))
    console.result("")
    header = ("tensor", "shape", "layout", "values", "sparsity", "bytes", "bits/weight")
    console.result(table(header, inspect_file.tensor_rows(found)))


def document(manifest: Manifest, folder: Path) -> dict[str, object]:
    """The `losa.inspect/1` document."""
    tensors = (*manifest.linears, *manifest.other_tensors)
    return {
        "schema": "losa.inspect/1",
        "kind": manifest.kind,
        "format": manifest.format,
        "source": manifest.source.model_dump(mode="json"),
        "sparsity_achieved": manifest.sparsity_achieved,
        "bits_per_weight": bits_per_weight(manifest.linears),
        "size_bytes": folder_bytes(folder),
        "merge_proof": manifest.merge_proof.model_dump(mode="json") if manifest.merge_proof else None,
        "tensors": [t.model_dump(mode="json") | {"sparsity": sparsity(t)} for t in tensors],
    }


def positions(tensor: TensorRecord) -> int:
    """Number of positions (dense weights) of a tensor."""
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def sparsity(tensor: TensorRecord) -> float:
    """Share of positions that are not stored as kept values."""
    return 1.0 - tensor.nnz / max(1, positions(tensor))


def bits_per_weight(tensors: Sequence[TensorRecord]) -> float:
    """Stored bits per position over several tensors."""
    return 8.0 * sum(t.bytes for t in tensors) / max(1, sum(positions(t) for t in tensors))


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _head(manifest: Manifest, folder: Path) -> Iterable[tuple[str, str]]:
    source = manifest.source
    yield "folder", f"{folder} ({manifest.kind}, {manifest.format})"
    yield "source", source.id + (f" @ {source.revision}" if source.revision else "")
    yield "written by", f"losa-deploy {manifest.tool_version}, preset {manifest.recipe.preset}"
    yield "sparsity", f"{manifest.sparsity_achieved:.4f} (target {manifest.recipe.sparsity.target:g})"
    yield "bits per weight", f"{bits_per_weight(manifest.linears):.3f} over the block linears"
    yield "size", f"{folder_bytes(folder) / 1e6:.1f} MB"
    proof = manifest.merge_proof
    if proof:
        verdict = "holds" if proof.ok else "FAILED"
        yield (
            "merge proof",
            f"{verdict}, support equal: {proof.support_equal}, cast error {proof.cast_error:.2e}",
        )


def _row(tensor: TensorRecord) -> tuple[str, ...]:
    return (
        tensor.name,
        "x".join(map(str, tensor.shape)),
        tensor.layout,
        tensor.value_type,
        f"{sparsity(tensor):.4f}",
        f"{tensor.bytes:,}",
        f"{tensor.bits_per_weight:.3f}",
        tensor.reason,
    )


COMMAND = Command(
    name="inspect",
    summary="show layout, bytes and bits per weight of every tensor, and where the model came from",
    examples=("losa-deploy inspect build/demo", "losa-deploy inspect build/demo.work/merged --json"),
    add_arguments=_add,
    run=_run,
)
