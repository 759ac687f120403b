"""`losa-deploy bench --geometry`: a synthetic model of ours beside its peers in the same runtime."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from losa_deploy.cli.flags import thread_count
from losa_deploy.console import Console, table
from losa_deploy.errors import UsageError
from losa_deploy.structure import Structure, parse_structure

if TYPE_CHECKING:
    from losa_deploy.benchmarks.synthetic.decoder import Geometry
    from losa_deploy.benchmarks.synthetic.peers import Contender, Load
    from losa_deploy.benchmarks.synthetic.tensors import Storage

T = TypeVar("T")


def run_geometry(args: argparse.Namespace, console: Console) -> None:
    """Build (or reuse), measure, and write the table or document."""
    from losa_deploy import plugins
    from losa_deploy.benchmarks.document import bench_document
    from losa_deploy.benchmarks.synthetic.geometry import GEOMETRIES
    from losa_deploy.benchmarks.synthetic.peers import (
        ONNX_RUNTIME,
        build_contenders,
        default_peers,
        known_peers,
        measure_contenders,
    )

    geometry: Geometry = pick(args.geometry, GEOMETRIES, "geometry", "--geometry")
    runtime, threads = plugins.load_runtime(args.runtime or ONNX_RUNTIME), thread_count(args)
    storage, load = chosen_storage(args), chosen_load(args, runtime.name)
    head = chosen_head(args, runtime.name)
    peers = chosen_peers(args.peers, known_peers(runtime.name), default_peers(runtime.name))
    with model_folder(args.keep) as folder:
        with console.stage("models") as progress:
            contenders = build_contenders(
                geometry,
                storage,
                peers,
                Path(folder),
                runtime,
                head=head,
                threads=threads,
                seed=args.seed,
                ik_folder=args.ik_path,
                progress=progress,
            )
        console.info(
            f"Measuring {geometry.name}, {storage.label}: {load.decode_tokens} tokens after "
            f"{load.prompt_tokens}, prompts of {load.prefill_tokens}, {threads} threads …"
        )
        with console.stage("speed") as progress:
            together = measure_contenders(contenders, load, threads, seed=args.seed, progress=progress)
    if not together:
        console.warn("The models do not fit into memory together: each was opened for its turns alone.")
    if args.json:
        workload = {
            "geometry": geometry.name,
            **dataclasses.asdict(storage),
            "head": head,
            **dataclasses.asdict(load),
            "runtime": runtime.name,
            "threads": threads,
            "seed": args.seed,
            "open_together": together,
        }
        console.result_json(bench_document([contender.record() for contender in contenders], workload))
    else:
        console.result(_table(contenders, load))


def chosen_storage(args: argparse.Namespace) -> Storage:
    """How our linears are stored; `UsageError` for values that contradict each other."""
    from losa_deploy.benchmarks.synthetic.tensors import Storage, layout_of_structure
    from losa_deploy.layouts import LAYOUTS, PATTERNED, VALUE_TYPES

    structure, layout = _structure(args.pattern or "unstructured"), args.layout or "auto"
    pattern = (structure.kept, structure.group) if structure.group else None
    if layout == "auto":
        layout = layout_of_structure(structure, args.value_type or "i4")
    if layout in PATTERNED and pattern is None:
        raise UsageError(
            f"--layout {layout} needs a pattern N:M.", hint="Add --pattern, e.g. --pattern 6:16."
        )
    if layout == "tiled" and (pattern is None or 16 % pattern[1] or args.value_type in ("f32", "f16")):
        raise UsageError(
            "--layout tiled stores i8 or i4 values of 1:4, 2:4 or N:16 (also as N of 2, 4 or 8).",
            hint="E.g. --pattern 6:16 --value-type i4.",
        )
    if not LAYOUTS[layout].stores(VALUE_TYPES[args.value_type or "i4"]):
        raise UsageError(
            f"--layout {layout} stores no {args.value_type} values.",
            hint="Add --layout dense, or e.g. --value-type i4.",
        )
    if structure.sparsity is not None and args.sparsity:
        raise UsageError(
            f"--pattern {args.pattern} already says how many zeros there are.", hint="Leave out --sparsity."
        )
    given = args.sparsity or [0.6] if structure.sparsity is None else [structure.sparsity]
    if len(given) > 1:
        raise UsageError("--geometry measures one --sparsity at a time.", hint="Run it once for each.")
    check_sparsity(given[0])
    if layout == "dense":
        return Storage(layout, args.value_type or "i4")
    windows = float(structure.stride)
    return Storage(
        layout, args.value_type or "i4", float(given[0]), pattern, stride=windows, paired=structure.paired
    )


def _structure(text: str) -> Structure:
    """What `--pattern` means; `UsageError` for anything that is no pattern."""
    if re.fullmatch(r"\d+:\d+", text):
        parse_pattern(text)
    try:
        return parse_structure(text)
    except ValueError as error:
        raise UsageError(f"--{error}.", hint="Example: 2:4 keeps 2 of every 4.") from None


def chosen_head(args: argparse.Namespace, runtime: str) -> str:
    """Value type of our head; `UsageError` where llama.cpp computes it."""
    from losa_deploy.benchmarks.synthetic.peers import ONNX_RUNTIME, stores_head

    if args.head and not stores_head(runtime):
        raise UsageError(
            f"--head chooses our head in ONNX Runtime; {runtime} computes its own.",
            hint=f"Leave out --head, or add --runtime {ONNX_RUNTIME}.",
        )
    return args.head or "i8"


def chosen_peers(text: str | None, known: Sequence[str], default: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of peers in the order given; `default` without `--peers`, none for `none`."""
    names = list(default) if text is None else split(text)
    if names == ["none"]:
        return ()
    for name in names:
        pick(name, dict.fromkeys(known), "peer", "--peers")
    if len(set(names)) < len(names):
        raise UsageError(f"--peers {text} names a peer twice.", hint="Name every peer once.")
    return tuple(names)


def chosen_load(args: argparse.Namespace, runtime: str) -> Load:
    """Tokens and repetitions; `UsageError` if they exceed the context of the models."""
    from losa_deploy.benchmarks.synthetic.decoder import CONTEXT
    from losa_deploy.benchmarks.synthetic.peers import Load, default_load

    names = [field.name for field in dataclasses.fields(Load)]
    given = {name: getattr(args, name) for name in names if getattr(args, name)}
    load = dataclasses.replace(default_load(runtime), **given)
    if load.longest > CONTEXT:
        raise UsageError(
            f"Sequences of {load.longest} tokens do not fit the models' context of {CONTEXT}.",
            hint="Give fewer --prompt-tokens, --decode-tokens or --prefill-tokens.",
        )
    return load


def pick(name: str, known: Mapping[str, T], noun: str, flag: str) -> T:
    """`known[name]`; `UsageError` with near matches for an unknown name."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"Did you mean `{flag} {near[0]}`?" if near else f"Give one of them to {flag}."
    raise UsageError(f"There is no {noun} {name!r}; known: {', '.join(known)}.", hint=hint)


def split(text: str) -> list[str]:
    """A list with commas; blanks around names do not count."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_pattern(text: str) -> tuple[int, int]:
    """(N, M); `UsageError` for anything else than 1 <= N < M <= 32."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= n < m <= 32:
        raise UsageError(
            f"{text!r} is no pattern N:M with 1 <= N < M <= 32.", hint="Example: 2:4 keeps 2 of every 4."
        )
    return n, m


def check_sparsity(value: float) -> None:
    """Raise `UsageError` unless it is a fraction of at least 0 and below 1."""
    if not 0 <= value < 1:
        raise UsageError(f"--sparsity {value:g} is no fraction from 0 to below 1.", hint="Example: 0.6")


def model_folder(keep: Path | None) -> AbstractContextManager[str]:
    """Where models are written: `keep`, or a temporary folder."""
    if keep is None:
        return tempfile.TemporaryDirectory(prefix="losa-bench-")
    keep.mkdir(parents=True, exist_ok=True)
    return nullcontext(str(keep))


def _table(contenders: Sequence[Contender], load: Load) -> str:
    header = ("model", f"tg{load.decode_tokens} tok/s", "ours ÷", f"pp{load.prefill_tokens} tok/s", "ours ÷")
    records = [contender.record() for contender in contenders]
    rows = []
    for record, contender in zip(records, contenders, strict=True):
        cells = [contender.name]
        for key in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            mine, this = float(str(records[0][key])), float(str(record[key]))
            cells += [f"{this:.1f}", f"{mine / this:.2f}"]
        rss = contender.footprint.peak_rss_bytes if contender.footprint else 0
        rows.append((*cells, f"{contender.bytes / 1e6:,.0f}", f"{rss / 1e6:,.0f}"))
    return table((*header, "MB", "peak RSS MB"), rows)
