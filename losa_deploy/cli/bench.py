"""`losa-deploy bench`: speed and memory of several models in the same call."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.command import Command
from losa_deploy.cli.flags import add_threads, positive, thread_count
from losa_deploy.console import Console, table
from losa_deploy.errors import UsageError

if TYPE_CHECKING:
    from losa_deploy.benchmarks.latency import Latency
    from losa_deploy.benchmarks.memory import Footprint
    from losa_deploy.benchmarks.workloads import Workload
    from losa_deploy.interfaces import Runtime, Session


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="model folders, side by side")
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="dense model (default: <PATH>.work/dense-onnx if there)"
    )
    parser.add_argument("--runtime", metavar="NAME", help="one runtime for all (default: by folder)")
    parser.add_argument(
        "--prompt-tokens", type=positive, default=128, metavar="N", help="prefill length (128)"
    )
    parser.add_argument("--decode-tokens", type=positive, default=32, metavar="N", help="decode length (32)")
    parser.add_argument("--repetitions", type=positive, default=5, metavar="N", help="measured runs (5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of prompt and order")
    add_threads(parser)


def models_to_measure(paths: list[Path], baseline: Path | None) -> dict[str, Path]:
    """Label → folder, the dense baseline first; `UsageError` for a folder given twice."""
    from losa_deploy.cli.stages import work_folder

    dense = baseline or work_folder(paths[0]) / "dense-onnx"
    chosen = ([dense] if baseline or dense.is_dir() else []) + paths
    labels = [str(path) for path in chosen]
    if len(set(labels)) < len(labels):
        raise UsageError("A model folder is given twice.", hint="Name every folder once.")
    return {
        ("dense " if path == dense else "") + label: path for label, path in zip(labels, chosen, strict=True)
    }


def _run(args: argparse.Namespace, console: Console) -> None:
    from losa_deploy.benchmarks.latency import measure_latency
    from losa_deploy.benchmarks.memory import measure_footprint
    from losa_deploy.benchmarks.workloads import Workload
    from losa_deploy.cli.stages import pick_runtime

    threads = thread_count(args)
    models = models_to_measure(args.paths, args.baseline)
    if len(models) == len(args.paths):
        console.warn("No dense baseline beside it; give one with --baseline to see what sparsity brings.")
    runtimes = {label: pick_runtime(path, args.runtime) for label, path in models.items()}
    load = Workload("bench", args.prompt_tokens, args.decode_tokens, args.repetitions)
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
        console.result_json(_document(runtimes, speeds, footprints, load, threads))
    else:
        console.result(_table(runtimes, speeds, footprints, load))


def _opener(runtime: Runtime, path: Path, threads: int) -> Callable[[], Session]:
    return lambda: runtime.open(path, threads=threads)


def _document(
    runtimes: Mapping[str, Runtime],
    speeds: Mapping[str, Latency],
    footprints: Mapping[str, Footprint],
    load: Workload,
    threads: int,
) -> dict[str, object]:
    from losa_deploy.benchmarks.environment import collect

    models = [
        {
            "model": label,
            "runtime": runtimes[label].name,
            "prefill_tokens_per_second": speed.prefill_tokens_per_second,
            "decode_tokens_per_second": speed.decode_tokens_per_second,
            "load_seconds": footprints[label].load_seconds,
            "peak_rss_bytes": footprints[label].peak_rss_bytes,
            "samples": [dataclasses.asdict(sample) for sample in speed.samples],
        }
        for label, speed in speeds.items()
    ]
    return {
        "schema": "losa.bench/1",
        "environment": collect().model_dump(mode="json"),
        "threads": threads,
        "workload": dataclasses.asdict(load),
        "models": models,
    }


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
    summary="measure prefill and decode speed, load time and peak memory, beside the dense model",
    examples=(
        "losa-deploy bench build/demo",
        "losa-deploy bench build/demo other/model --repetitions 3 --threads 2 --json",
    ),
    add_arguments=_add,
    run=_run,
)
