"""`losa-deploy bench PATH --peers`: artifacts beside what others make of the dense model.

Speed, bytes, memory and perplexity of every file in one call: quality per byte and per token.
"""

from __future__ import annotations

import argparse
import dataclasses
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.bench_geometry import chosen_load, chosen_peers, model_folder
from losa_deploy.cli.bench_outcome import check_outputs, publish
from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console

if TYPE_CHECKING:
    from losa_deploy.sources.checkpoint import Checkpoint


def run_peers(args: argparse.Namespace, console: Console) -> None:
    """Make the peers, measure everything interleaved, and publish table or document, and the verdict."""
    from losa_deploy.benchmarks.contest import measure_quality
    from losa_deploy.benchmarks.peer_kinds import Material
    from losa_deploy.benchmarks.real_peers import all_real_peers, dense_file, peer_runtime, real_contenders
    from losa_deploy.benchmarks.synthetic.peers import ik_runtime, measure_contenders
    from losa_deploy.pipeline import work_folder
    from losa_deploy.text.tokenizer import load_tokenizer

    check_outputs(args)
    paths, threads = [Path(path) for path in args.paths], thread_count(args)
    runtime = peer_runtime(paths)
    peers = chosen_peers(args.peers, all_real_peers())
    ik = ik_runtime(peers, args.ik_path)
    load = chosen_load(args, runtime.name)
    dense = dense_file(work_folder(paths[0] if paths[0].is_dir() else paths[0].parent), args.baseline)
    with model_folder(args.keep) as folder:
        with console.stage("models") as progress:
            source = cache(partial(_source, dense, Path(folder), console))
            material = Material(dense, source, Path(folder), threads, runtime, progress, args.openvino_path)
            contenders, missing = real_contenders(paths, peers, material, ik=ik)
        with console.stage("perplexity") as progress:
            tokenizer, tokens = load_tokenizer(paths[0]), args.text_tokens
            missing |= measure_quality(contenders, tokenizer, threads, tokens, progress)
        contenders = [contender for contender in contenders if contender.name not in missing]
        with console.stage("speed") as progress:
            measure_contenders(contenders, load, threads, seed=args.seed, progress=progress)
    workload = {**dataclasses.asdict(load), "runtime": runtime.name, "threads": threads, "seed": args.seed}
    publish(contenders, missing, dense, workload, args, console)


def _source(dense: Path, folder: Path, console: Console) -> Checkpoint:
    """The dense file as a Hugging Face folder, of which importances, our own dense i4 and others are made."""
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
