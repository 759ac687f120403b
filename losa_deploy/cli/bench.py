"""`losa-deploy bench`: models side by side, synthetic models of a known size, or the kernels alone."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_threads, positive, thread_count
from losa_deploy.cli.options import number
from losa_deploy.console import Console, table
from losa_deploy.errors import InputError, UsageError

if TYPE_CHECKING:
    from losa_deploy.benchmarks.latency import Latency
    from losa_deploy.benchmarks.memory import Footprint
    from losa_deploy.benchmarks.workloads import Workload
    from losa_deploy.interfaces import Runtime, Session

KERNELS, RECIPES = "kernels", "recipes"
FOLDERS, PEERS, GEOMETRY, KERNEL_TABLE = "model folders", "--peers", "--geometry", "`bench kernels`"
GRID = "`bench recipes`"
MODES: Mapping[str, tuple[str, ...]] = {
    "baseline": (FOLDERS, PEERS),
    "runtime": (FOLDERS, GEOMETRY),
    **dict.fromkeys(("prompt_tokens", "decode_tokens", "repetitions"), (FOLDERS, GEOMETRY, PEERS)),
    "prefill_tokens": (GEOMETRY, PEERS),
    "value_type": (GEOMETRY,),
    "layout": (GEOMETRY,),
    "pattern": (GEOMETRY,),
    "head": (GEOMETRY,),
    "peers": (GEOMETRY, PEERS),
    "keep": (GEOMETRY, PEERS),
    "ik_path": (GEOMETRY, PEERS),
    "openvino_path": (PEERS,),
    "text_tokens": (PEERS,),
    "sparsity": (GEOMETRY, KERNEL_TABLE),
    **dict.fromkeys(("rows", "columns", "layouts", "value_types", "targets", "tokens"), (KERNEL_TABLE,)),
    **dict.fromkeys(("seconds", "deepsparse"), (KERNEL_TABLE,)),
    "plot": (KERNEL_TABLE, PEERS),
    "output": (GRID, PEERS),
}
"""Flags that only some kinds of measurement have; None where they are not given."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="model folders or GGUF files, or the word `kernels`, or `recipes GRID.yaml`",
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="dense model (default: in <PATH>.work if there)"
    )
    parser.add_argument("--runtime", metavar="NAME", help="one runtime for all (default: by folder, or ort)")
    parser.add_argument(
        "--prompt-tokens", type=positive, metavar="N", help="prompt before decoding (128; geometry: 32)"
    )
    parser.add_argument(
        "--decode-tokens", type=positive, metavar="N", help="decode length (32; geometry: 128)"
    )
    parser.add_argument("--repetitions", type=positive, metavar="N", help="measured runs (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of prompt and order")
    add_threads(parser)
    _add_geometry(parser.add_argument_group("synthetic models, instead of PATH"))
    _add_kernels(parser.add_argument_group("`bench kernels`"))
    grid = parser.add_argument_group("`bench recipes`, and --peers")
    grid.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="results, table and plot; of recipes also what continues (default: GRID.results)",
    )


def _add_geometry(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--geometry", metavar="NAME", help="llama-1b, llama-3b, llama-7b or llama-7b-4blocks")
    group.add_argument("--value-type", choices=("f32", "f16", "i8", "i4", "i3"), help="our kept values (i4)")
    group.add_argument(
        "--sparsity", type=number, nargs="+", metavar="X", help="zeros (0.6; kernels: 0.5 0.6 0.7)"
    )
    group.add_argument(
        "--layout",
        choices=("auto", "dense", "bitmask", "nm", "tiled"),
        help="our layout (auto: as the pattern)",
    )
    group.add_argument(
        "--pattern", metavar="PATTERN", help="N:M or sliding[:2.5], instead of --sparsity; or pair"
    )
    group.add_argument(
        "--head", choices=("i8", "i4"), help="our head, in ONNX Runtime (i8; ort-int4 has int4)"
    )
    group.add_argument(
        "--peers",
        metavar="NAMES",
        help="ort-int4,ort-int8,ort-fp32, or of llamacpp q4_0,q4_k_m,q8_0,q3_k_m,q3_k_s,q2_k,f16 (all of "
        "these), and by name ours-dense-i4,ours-dense-i3, ort-int2, iq3_xxs,iq2_m; of ik_llama.cpp "
        "ik-q4_0,ik-q3_k_s,ik-iq3_k,ik-q2_k,ik-iq4_ks,ik-iq2_k; with PATH those of llamacpp and "
        "ort-int4,ort-int2, openvino-q4_0,openvino-q8_0,openvino-q4_k_m; or none",
    )
    group.add_argument(
        "--ik-path",
        type=Path,
        metavar="DIR",
        help="where ik-llama-cpp-python lies (pip install --target DIR)",
    )
    group.add_argument(
        "--openvino-path",
        type=Path,
        metavar="DIR",
        help="with PATH: where openvino-genai lies (pip install --target DIR)",
    )
    group.add_argument(
        "--prefill-tokens", type=positive, metavar="N", help="prompt whose reading is timed (512)"
    )
    group.add_argument(
        "--text-tokens",
        type=positive,
        metavar="N",
        help="with PATH: tokens of the text for perplexities (4096)",
    )
    group.add_argument("--keep", type=Path, metavar="DIR", help="keep the models here, and reuse them")


def _add_kernels(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--rows", type=positive, metavar="N", help="outputs of the matrix (4096)")
    group.add_argument("--columns", type=positive, metavar="N", help="inputs of the matrix (11008)")
    group.add_argument(
        "--layouts", metavar="NAMES", help="dense, bitmask, pair, sliding, and N:M patterns, with commas"
    )
    group.add_argument("--value-types", metavar="NAMES", help="f32, f16, i8, i4 and i3, with commas")
    group.add_argument("--targets", metavar="NAMES", help="kernels, with commas (all this CPU can run)")
    group.add_argument("--tokens", type=positive, nargs="+", metavar="N", help="tokens at once (1 64)")
    group.add_argument("--seconds", type=number, metavar="S", help="time for the whole table (100)")
    group.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="a roofline as .svg or .png (matplotlib); with --peers quality against speed and bytes, as .svg",
    )
    group.add_argument(
        "--deepsparse", type=Path, metavar="PYTHON", help="compare with DeepSparse in that environment"
    )


def _run(args: argparse.Namespace, console: Console) -> None:
    mode = _mode(args)
    _check_flags(args, mode)
    if mode == KERNEL_TABLE:
        from losa_deploy.cli.bench_kernels import run_kernels

        run_kernels(args, console)
    elif mode == GRID:
        from losa_deploy.cli.bench_recipes import run_recipes

        run_recipes(args, console)
    elif mode == PEERS:
        from losa_deploy.cli.bench_peers import run_peers

        run_peers(args, console)
    elif mode == GEOMETRY:
        from losa_deploy.cli.bench_geometry import run_geometry

        run_geometry(args, console)
    else:
        _run_folders(args, console)


def _mode(args: argparse.Namespace) -> str:
    if args.geometry is not None:
        if args.paths:
            raise UsageError(
                f"--geometry {args.geometry} makes its own models, but {args.paths[0]} is given too.",
                hint="Leave out one of the two.",
            )
        return GEOMETRY
    if args.paths == [KERNELS]:
        return KERNEL_TABLE
    if args.paths and args.paths[0] == RECIPES:
        if len(args.paths) != 2:
            raise UsageError(
                f"`bench recipes` takes one grid, found {len(args.paths) - 1}.",
                hint="Example: losa-deploy bench recipes grid.yaml",
            )
        return GRID
    if KERNELS in args.paths:
        raise UsageError("`bench kernels` takes no model folders.", hint="Measure them in another call.")
    if not args.paths:
        raise UsageError(
            "There is nothing to measure.",
            hint="Give model folders, the word `kernels`, or --geometry llama-1b.",
        )
    return FOLDERS if args.peers is None else PEERS


def _check_flags(args: argparse.Namespace, mode: str) -> None:
    """Raise `UsageError` for a flag that this kind of measurement does not have."""
    for name, modes in MODES.items():
        if getattr(args, name) is not None and mode not in modes:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} says nothing about {mode}; it belongs to {' and '.join(modes)}.",
                hint=f"Leave {flag} out.",
            )


def models_to_measure(paths: list[Path], baseline: Path | None) -> dict[str, Path]:
    """Label → folder, the dense baseline first; `UsageError` for a folder given twice."""
    dense = baseline or _kept_baseline(paths[0] if paths[0].is_dir() else paths[0].parent)
    chosen = ([dense] if dense else []) + paths
    labels = [str(path) for path in chosen]
    if len(set(labels)) < len(labels):
        raise UsageError("A model folder is given twice.", hint="Name every folder once.")
    return {
        ("dense " if path == dense else "") + label: path for label, path in zip(labels, chosen, strict=True)
    }


def _kept_baseline(artifact: Path) -> Path | None:
    """The dense baseline in the work folder of an artifact; None if there is none."""
    from losa_deploy.benchmarks.report.baseline import baseline_name
    from losa_deploy.manifest import Manifest
    from losa_deploy.pipeline import work_folder

    try:
        dense = work_folder(artifact) / baseline_name(Manifest.read(artifact).format)
    except InputError:
        return None
    return dense if dense.is_dir() else None


def _run_folders(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.benchmarks.latency import measure_latency
    from losa_deploy.benchmarks.memory import measure_footprint
    from losa_deploy.benchmarks.workloads import Workload
    from losa_deploy.pipeline import pick_runtime

    threads = thread_count(args)
    paths = [Path(path) for path in args.paths]
    models = models_to_measure(paths, args.baseline)
    if len(models) == len(paths):
        console.warn("No dense baseline beside it; give one with --baseline to see what sparsity brings.")
    runtimes = {label: pick_runtime(path, args.runtime) for label, path in models.items()}
    if args.runtime is None:
        runtimes |= {label: r.baseline() for label, r in runtimes.items() if label.startswith("dense ")}
    load = Workload("bench", args.prompt_tokens or 128, args.decode_tokens or 32, args.repetitions or 5)
    footprints: dict[str, Footprint] = {}
    with console.stage("memory") as progress:
        for done, (label, path) in enumerate(models.items()):
            progress(done, len(models), label)
            footprints[label] = measure_footprint(runtimes[label].name, path, threads=threads)
        progress(len(models), len(models), "done")
    console.info(
        f"Measuring speed: {load.prompt_tokens} tokens in, {load.decode_tokens} out, {threads} threads …"
    )
    openers = {label: _opener(runtimes[label], path, threads) for label, path in models.items()}
    speeds = measure_latency(openers, load, seed=args.seed)
    if args.json:
        console.result_json(_document(models, runtimes, speeds, footprints, threads))
    else:
        console.result(_table(runtimes, speeds, footprints, load))


def _opener(runtime: Runtime, path: Path, threads: int) -> Callable[[], Session]:
    return lambda: runtime.open(path, threads=threads)


def _document(
    models: Mapping[str, Path],
    runtimes: Mapping[str, Runtime],
    speeds: Mapping[str, Latency],
    footprints: Mapping[str, Footprint],
    threads: int,
) -> dict[str, object]:
    from losa_deploy.benchmarks.document import bench_document, result_record

    results = []
    for label, speed in speeds.items():
        foot = footprints[label]
        rates = (speed.decode_rates, speed.prefill_rates)
        record = result_record(label, *rates, _size(models[label]), foot.peak_rss_bytes)
        results.append({**record, "runtime": runtimes[label].name, "load_seconds": foot.load_seconds})
    workload = dataclasses.asdict(next(iter(speeds.values())).workload)
    return bench_document(results, {**workload, "threads": threads})


def _size(folder: Path) -> int:
    """Bytes of the model's files, by its manifest if it has one; of a file its own."""
    from losa_deploy.benchmarks.report.baseline import folder_bytes
    from losa_deploy.manifest import Manifest

    if folder.is_file():
        return folder.stat().st_size
    try:
        return folder_bytes(folder, Manifest.read(folder))
    except InputError:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _table(
    runtimes: Mapping[str, Runtime],
    speeds: Mapping[str, Latency],
    footprints: Mapping[str, Footprint],
    load: Workload,
) -> str:
    header = ("model", "runtime", f"pp{load.prompt_tokens} tok/s", f"tg{load.decode_tokens} tok/s")
    rows = [
        (
            label,
            runtimes[label].name,
            f"{speed.prefill_tokens_per_second:.1f}",
            f"{speed.decode_tokens_per_second:.1f} ± {100 * speed.decode_spread:.0f} %",
            f"{footprints[label].load_seconds:.2f}",
            f"{footprints[label].peak_rss_bytes / 1e6:,.0f}",
        )
        for label, speed in speeds.items()
    ]
    return table((*header, "load s", "peak RSS MB"), rows)


COMMAND = Command(
    name="bench",
    summary="measure speed, load time and memory of models, of synthetic ones, or of the kernels",
    examples=(
        "losa-deploy bench build/demo --threads 2 --json",
        "losa-deploy bench recipes grid.yaml --output build/grid",
    ),
    add_arguments=_add,
    run=_run,
)
