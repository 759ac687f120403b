"""`losa-deploy bench PATH --peers`: artifacts beside what others make of the dense model.

Speed, bytes, memory and perplexity of every file in one call: quality per byte and per token.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from losa_deploy.cli.bench_geometry import chosen_load, chosen_peers, model_folder
from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console, table

if TYPE_CHECKING:
    from losa_deploy.benchmarks.synthetic.peers import Contender, Load
    from losa_deploy.progress import Progress
    from losa_deploy.sources.checkpoint import Checkpoint


def run_peers(args: argparse.Namespace, console: Console) -> None:
    """Quantize the peers, measure everything interleaved, and write the table or document."""
    from losa_deploy.benchmarks.document import bench_document
    from losa_deploy.benchmarks.real_peers import all_real_peers, dense_file, peer_runtime, real_contenders
    from losa_deploy.benchmarks.synthetic.peers import ik_runtime, measure_contenders
    from losa_deploy.pipeline import work_folder

    paths, threads = [Path(path) for path in args.paths], thread_count(args)
    runtime = peer_runtime(paths)
    peers = chosen_peers(args.peers, all_real_peers())
    ik = ik_runtime(peers, args.ik_path)
    load = chosen_load(args, runtime.name)
    dense = dense_file(work_folder(paths[0] if paths[0].is_dir() else paths[0].parent), args.baseline)
    with model_folder(args.keep) as folder:
        with console.stage("models") as progress:
            source = partial(_source, dense, Path(folder), console)
            contenders = real_contenders(
                runtime, paths, dense, peers, source, Path(folder), threads, progress, ik=ik
            )
        with console.stage("perplexity") as progress:
            _measure_quality(contenders, paths[0], threads, progress)
        with console.stage("speed") as progress:
            measure_contenders(contenders, load, threads, seed=args.seed, progress=progress)
    if args.json:
        about = {"runtime": runtime.name, "threads": threads, "seed": args.seed}
        workload = {**dataclasses.asdict(load), **about}
        console.result_json(bench_document([contender.record() for contender in contenders], workload))
    else:
        console.result(_table(contenders, load))


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


def _measure_quality(
    contenders: Sequence[Contender], artifact: Path, threads: int, progress: Progress
) -> None:
    from losa_deploy.benchmarks.accuracy import perplexity, text_windows
    from losa_deploy.recipe import VerifyRecipe
    from losa_deploy.text.tokenizer import load_tokenizer
    from losa_deploy.verify.questions import evaluation_text

    verify = VerifyRecipe()
    tokenizer = load_tokenizer(artifact)
    for done, contender in enumerate(contenders):
        progress(done, len(contenders), f"perplexity of {contender.name}")
        session = contender.runtime.open(contender.folder, threads=threads)
        try:
            window = min(verify.window, session.context_length or verify.window)
            windows = text_windows(tokenizer, evaluation_text(verify.text), window, verify.max_tokens)
            contender.quality = perplexity(session, windows, window)
        finally:
            session.close()


def _table(contenders: Sequence[Contender], load: Load) -> str:
    header = ("model", "MB", "perplexity", f"tg{load.decode_tokens} tok/s", f"pp{load.prefill_tokens} tok/s")
    rows = []
    for contender in contenders:
        record = contender.record()
        quality = contender.quality
        rows.append(
            (
                contender.name,
                f"{contender.bytes / 1e6:,.1f}",
                f"{quality.perplexity:.2f} ± {quality.stderr:.2f}" if quality else "",
                f"{float(str(record['decode_tokens_per_second'])):.1f}",
                f"{float(str(record['prefill_tokens_per_second'])):.1f}",
                f"{contender.footprint.peak_rss_bytes / 1e6:,.0f}" if contender.footprint else "",
            )
        )
    return table((*header, "peak RSS MB"), rows)
