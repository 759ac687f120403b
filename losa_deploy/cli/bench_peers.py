"""`losa-deploy bench PATH --peers`: GGUF artifacts beside llama.cpp's own quantizations of the dense model.

Speed, bytes, memory and perplexity of every file in one call: quality per byte and per token.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.bench_geometry import chosen_load, chosen_peers, model_folder
from losa_deploy.cli.bench_outcome import check_outputs, publish
from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console
from losa_deploy.errors import InputError

if TYPE_CHECKING:
    from losa_deploy.sources.checkpoint import Checkpoint

RUNTIME = "llamacpp"
BASELINE = "dense-gguf"


def run_peers(args: argparse.Namespace, console: Console) -> None:
    """Quantize the peers, measure everything interleaved, and publish table or document, and the verdict."""
    from losa_deploy import plugins
    from losa_deploy.benchmarks.contest import measure_quality
    from losa_deploy.benchmarks.ik.package import PEERS as IK_PEERS
    from losa_deploy.benchmarks.real_peers import real_contenders, real_peers
    from losa_deploy.benchmarks.synthetic.peers import ik_runtime, measure_contenders
    from losa_deploy.text.tokenizer import load_tokenizer

    check_outputs(args)
    runtime, threads = plugins.load_runtime(RUNTIME), thread_count(args)
    paths = [Path(path) for path in args.paths]
    for path in paths:
        if not runtime.supports(path):
            raise InputError(
                f"{path} holds no GGUF file, and --peers quantizes GGUF files.",
                hint="Leave --peers out, or export with --format gguf.",
            )
    peers = chosen_peers(args.peers, (*real_peers(), *IK_PEERS))
    ik = ik_runtime(peers, args.ik_path)
    load = chosen_load(args, RUNTIME)
    dense = dense_file(paths[0], args.baseline)
    with model_folder(args.keep) as folder:
        with console.stage("models") as progress:
            source = partial(_source, dense, Path(folder), console)
            contenders, missing = real_contenders(
                paths, dense, peers, source, Path(folder), threads, progress, ik=ik
            )
        with console.stage("perplexity") as progress:
            tokenizer, tokens = load_tokenizer(paths[0]), args.text_tokens
            missing |= measure_quality(contenders, tokenizer, threads, tokens, progress)
        contenders = [contender for contender in contenders if contender.name not in missing]
        with console.stage("speed") as progress:
            measure_contenders(contenders, load, threads, seed=args.seed, progress=progress)
    workload = {**dataclasses.asdict(load), "runtime": RUNTIME, "threads": threads, "seed": args.seed}
    publish(contenders, missing, dense, workload, args, console)


def _source(dense: Path, folder: Path, console: Console) -> Checkpoint:
    """The dense file as a Hugging Face folder, of which importances and our own dense i4 are made."""
    from losa_deploy.progress import no_progress
    from losa_deploy.sources.locate import load_source

    checkpoint, _ = load_source(
        str(dense),
        revision=None,
        work=folder,
        offline=True,
        cache_dir=None,
        progress=no_progress,
        warn=console.warn,
    )
    return checkpoint


def dense_file(path: Path, baseline: Path | None) -> Path:
    """The dense GGUF that peers are made of: in `baseline`, or in the work folder of the artifact."""
    from losa_deploy.pipeline import work_folder

    folder = baseline or work_folder(path if path.is_dir() else path.parent) / BASELINE
    found = [folder] if folder.is_file() else sorted(folder.glob("*.gguf"))
    if not found:
        raise InputError(
            f"There is no dense GGUF in {folder}, of which the peers could be made.",
            hint="Give one with --baseline, e.g. an F16 conversion of the unpruned model.",
        )
    return found[0]
