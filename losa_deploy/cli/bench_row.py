"""One row of a grid in a process of its own, so that its peak memory is its own.

`python -m losa_deploy.cli.bench_row JOB RESULT`: both are JSON files. An error goes to stderr as a
`losa.error/1` document, with its exit code.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import resource
import signal
import sys
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.console import Console
from losa_deploy.errors import LosaError
from losa_deploy.pipeline import stamp_recipe

if TYPE_CHECKING:
    from losa_deploy.benchmarks.grid import PeerRow, RecipeRow
    from losa_deploy.manifest import SourceRecord
    from losa_deploy.model import SparseModel
    from losa_deploy.recipe import Recipe
    from losa_deploy.sources.checkpoint import Checkpoint

PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclasses.dataclass(frozen=True)
class RowJob:
    """What a row needs; paths as text, because it travels as JSON."""

    row: dict[str, object]
    model: str | None
    """As in the grid."""
    shared: str
    """Folder of what rows share: the converted source, importances."""
    dense: str | None
    """GGUF file of the dense model, for peers."""
    folder: str
    """Of this row alone."""
    threads: int
    parent: int
    """The process that waits for this row."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A model that can be evaluated."""

    path: str
    bytes: int
    block_bytes: int
    block_bits_per_weight: float
    sparsity: float
    grid_bits_per_weight: float | None = None
    """Of a merged folder whose weights are all on a trained grid, see `grid_bits`."""
    make_peak_rss_bytes: int = 0


def make(job: RowJob, console: Console) -> Made:
    """Make the model of a row."""
    from losa_deploy.benchmarks.grid import DenseRow, PeerRow, parse_row
    from losa_deploy.cli import stages

    row = parse_row(job.row, "this row")
    if isinstance(row, PeerRow):  # torch, which most peers do not need, would count as their memory
        return _peer(row, job)
    stages.set_threads(job.threads)
    source, record = open_model(job.model, Path(job.shared), console)
    if isinstance(row, DenseRow):
        return _dense(source)
    return _recipe(row, source, record, job, console)


def open_model(model: str | None, work: Path, console: Console) -> tuple[Checkpoint, SourceRecord]:
    """The dense model of a grid; a GGUF is converted once into `work`."""
    import os

    from losa_deploy.sources.locate import load_source

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    with console.stage("source") as progress:
        return load_source(
            model,
            revision=None,
            work=work,
            offline=offline,
            cache_dir=None,
            progress=progress,
            warn=console.warn,
        )


def _recipe(row: RecipeRow, source: Checkpoint, record: SourceRecord, job: RowJob, console: Console) -> Made:
    """Compressed, merged and exported; an interrupted compression goes on where it was."""
    from losa_deploy import plugins
    from losa_deploy.benchmarks.report.baseline import folder_bytes
    from losa_deploy.card import mean_bits
    from losa_deploy.cli import all_stages
    from losa_deploy.manifest import Manifest

    recipe, folder = row.effective(), Path(job.folder)
    if row.format != "none":
        plugins.load_exporter(row.format).check_source(source, recipe.export)
    texts = Path(job.shared)
    model = all_stages.merged_model(source, record, recipe, folder, {}, console, texts=texts)
    place = model.folder if row.format == "none" else _exported(row.format, model, recipe, folder, console)
    manifest = Manifest.read(place)
    return Made(
        str(place),
        folder_bytes(place, manifest),
        sum(linear.bytes for linear in manifest.linears),
        mean_bits(manifest),
        manifest.sparsity_achieved,
        grid_bits(model) if row.format == "none" else None,
    )


def grid_bits(model: SparseModel) -> float | None:
    """Bits per weight of levels, f16 scales and the pattern's positions; None where a weight is on no grid.

    That is what a format of this pattern and these levels takes, whether or not there is one.
    """
    from losa_deploy.structure import fixed_bits

    structure, bits, weights = model.manifest.recipe.sparsity.structure, 0.0, 0
    for name, (rows, columns) in model.linears.items():
        grid = model.grid(name)
        if grid is None:
            return None
        size, width = rows * columns, int(grid.value_type[1:])
        if name not in model.masked or not model.manifest.sparsity_achieved:
            bits += width * size + 16 * grid.scales.size
        elif structure.sparsity is not None:
            bits += fixed_bits(structure, grid.value_type, grid.group_size or columns) * size
        else:
            kept = int(model.mask(name).sum())
            bits += width * kept + size * (0.5 if structure.paired else 1.0) + 16 * grid.scales.size
        weights += size
    return bits / weights


def _exported(name: str, model: SparseModel, recipe: Recipe, folder: Path, console: Console) -> Path:
    from losa_deploy import plugins
    from losa_deploy.output import staged_output
    from losa_deploy.planned import export_planned

    exporter = plugins.load_exporter(name)
    plan, output = exporter.plan(model, recipe.export), folder / name
    with staged_output(output, overwrite=True) as place, console.stage("export") as progress:
        export_planned(exporter, model, plan, place, progress)
        stamp_recipe(place, recipe)
    return output


def _peer(row: PeerRow, job: RowJob) -> Made:
    from losa_deploy.benchmarks.gguf_peers import make_peer
    from losa_deploy.benchmarks.gguf_sizes import block_sizes
    from losa_deploy.cli import stages

    assert job.dense is not None  # the parent makes it for grids with peers
    dense = Path(job.dense)

    def source() -> Checkpoint:
        stages.set_threads(job.threads)
        return open_model(job.model, Path(job.shared), Console(color=False))[0]

    path = make_peer(
        row.peer,
        dense,
        source,
        Path(job.folder),
        job.threads,
        imatrix=row.imatrix,
        shared=Path(job.shared),
    )
    stored, weights = block_sizes(path).bytes, block_sizes(dense).weights
    return Made(str(path), path.stat().st_size, stored, 8 * stored / weights, 0.0)


def _dense(source: Checkpoint) -> Made:
    """The source itself; f32 in memory, whatever its files hold."""
    weights = sum(prod(shape) for shape in source.linears.values())
    stored = sum(
        prod(shape) * DTYPE_BYTES[source.header(f"{name}.weight")[0]]
        for name, shape in source.linears.items()
    )
    size = sum(path.stat().st_size for path in set(source.files.values()))
    return Made(str(source.folder), size, stored, 8 * stored / weights, 0.0)


def peak_rss_bytes() -> int:
    """Of this process, or of the largest one that it started."""
    from losa_deploy.benchmarks import probe

    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(probe.peak_rss_bytes(), children if sys.platform == "darwin" else children * 1024)


def end_with(parent: int) -> bool:
    """Let this process end when `parent` is killed: its successor works in the same folder.

    False if the parent is gone already. Only Linux can do the former.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    return os.getppid() == parent


def main(arguments: list[str]) -> int:
    """Read the job, make the model, write the result."""
    job = RowJob(**json.loads(Path(arguments[0]).read_text("utf-8")))
    if not end_with(job.parent):
        return 1
    try:
        made = make(job, Console(color=False))
    except LosaError as error:
        sys.stderr.write(json.dumps(error.to_json()) + "\n")
        return error.exit_code
    result = dataclasses.replace(made, make_peak_rss_bytes=peak_rss_bytes())
    Path(arguments[1]).write_text(json.dumps(dataclasses.asdict(result)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
