"""Models of one geometry side by side in one runtime: ours, and what people run otherwise.

All models take turns in a shuffled order, so that a change of the machine's clock or load meets all
of them alike. Where they do not fit into the memory together, each is opened for its turn and closed
again; the result says so.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from losa_deploy.interfaces import Runtime, Session
from losa_deploy.output import require_disk
from losa_deploy.progress import Progress, no_progress
from losa_deploy.verify.distance import Floats

from ..accuracy import Perplexity
from ..document import result_record
from ..ik import package as ik_package
from ..ik.runtime import IkRuntime
from ..latency import SETTLE_SECONDS, sample, schedule
from ..memory import Footprint, measure_footprint
from ..workloads import prompt_tokens
from . import ggufs
from .decoder import CONTEXT, Geometry
from .geometry import build
from .linears import OURS, PEERS, Linear, OrtInt2, Ours
from .tensors import Pruning, Storage

OURS_DENSE: Mapping[str, Storage] = {
    f"ours-dense-{value_type}": Storage("dense", value_type) for value_type in ("i4", "i3")
}
"""Peers in our own kernels: what our formats cost where nothing is pruned."""
LLAMACPP = "llamacpp"
ONNX_RUNTIME = "ort"
"""Where models are measured unless another runtime is named."""
WARM_TOKENS = 8
MEMORY_SHARE = 0.85
"""Of the free memory that open models may fill together."""

Measure = Callable[[Path, int], Footprint]
"""Model, threads → what a fresh process costs."""


@dataclass(frozen=True)
class Load:
    """`decode_tokens` after a prompt of `prompt_tokens`; and, apart from it, a prompt of `prefill_tokens`."""

    prompt_tokens: int = 32
    decode_tokens: int = 128
    prefill_tokens: int = 512
    repetitions: int = 5

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; may not exceed `CONTEXT`."""
        return max(self.prompt_tokens + self.decode_tokens, self.prefill_tokens)


def default_load(runtime: str) -> Load:
    """What people measure in this runtime: llama-bench's tg128 starts from one token, its pp512 from none."""
    return Load(prompt_tokens=1) if runtime == LLAMACPP else Load()


@dataclass
class Contender:
    """One model and what was measured on it."""

    name: str
    folder: Path
    bytes: int
    runtime: Runtime
    measure: Measure | None = None
    """How its footprint is measured; None: by the name of its runtime."""
    footprint: Footprint | None = None
    own: bool = False
    """A file that the user asks about, not a peer."""
    quality: Perplexity | None = None
    """Where the weights are real."""
    losses: list[Floats] = field(default_factory=list)
    """What `quality` sums up: negative log-likelihoods [n] of every window, in nats."""
    quality_missing: str = ""
    """Why there is no `quality`, of real weights."""
    decode_rates: list[float] = field(default_factory=list)
    prefill_rates: list[float] = field(default_factory=list)
    """Tokens per second, one per repetition."""

    def record(self) -> dict[str, object]:
        """One entry of `results` in the `losa.bench/1` document."""
        record = result_record(
            self.name,
            self.decode_rates,
            self.prefill_rates,
            self.bytes,
            self.footprint.peak_rss_bytes if self.footprint else None,
        )
        if self.quality is not None:
            record |= {
                "perplexity": self.quality.perplexity,
                "perplexity_stderr": self.quality.stderr,
                "perplexity_tokens": self.quality.tokens,
                "perplexity_window": self.quality.window,
            }
        elif self.quality_missing:
            record |= {"perplexity": None, "perplexity_missing": self.quality_missing}
        return record


def build_contenders(
    geometry: Geometry,
    storage: Storage,
    peers: Sequence[str],
    folder: Path,
    runtime: Runtime,
    *,
    head: str = "i8",
    threads: int = 0,
    seed: int = 0,
    ik_folder: Path | None = None,
    progress: Progress = no_progress,
) -> list[Contender]:
    """Ours, pruned and stored as `storage` says, and the dense peers of the runtime (`known_peers`).

    Our head is stored as `head`; in llama.cpp it is Q8_0. Written into `folder` or reused from it. Raises
    `ResourceError` if the disk cannot hold them, `MissingError` if peers of ik_llama.cpp are named and it is
    neither in `ik_folder` nor, where that is None, installed.
    """
    if runtime.name == LLAMACPP:
        ik = ik_runtime(peers, ik_folder)
        return _ggufs(geometry, storage, peers, folder, runtime, threads, seed, ik, progress)
    ours, label = Ours(storage, Storage("dense", head)), f"ours-{_slug(storage)}"
    pruning = storage.pruning(seed)
    made: list[tuple[Linear, Pruning, str]] = [(ours, pruning, _onnx_label(label, head))]
    made += [(_onnx_peer(name, head), Pruning(0.0, seed=seed), _onnx_label(name, head)) for name in peers]
    places = [folder / f"{geometry.name}-{label}" for _, _, label in made]
    missing = [kind for (kind, _, _), place in zip(made, places, strict=True) if not place.exists()]
    require_disk(folder, sum(geometry.estimate(kind) for kind in missing), "The models")
    contenders = []
    for (kind, pruning, _), place in zip(made, places, strict=True):
        size = build(geometry, kind, place, pruning, progress=progress)
        contenders.append(Contender(kind.name, place, size, runtime))
    return contenders


def stores_head(runtime: str) -> bool:
    """Whether our head can be stored in a type of choice for this runtime: llama.cpp computes its own."""
    return runtime == ONNX_RUNTIME


def known_peers(runtime: str) -> tuple[str, ...]:
    """Names of the peers that models are compared with in this runtime."""
    if runtime == LLAMACPP:
        return (*ggufs.PEERS, *ggufs.WITH_IMPORTANCE, *OURS_DENSE, *ik_package.PEERS)
    return (*PEERS, *OURS_DENSE)


def default_peers(runtime: str) -> tuple[str, ...]:
    """Of `known_peers` those that are measured if none is named: what people run without us."""
    return (
        tuple(ggufs.PEERS) if runtime == LLAMACPP else tuple(name for name in PEERS if name != OrtInt2.name)
    )


def _onnx_peer(name: str, head: str) -> Linear:
    """How it computes linears; one of ours stores its head as our pruned model does."""
    if name in OURS_DENSE:
        return Ours(OURS_DENSE[name], Storage("dense", head), name)
    return PEERS[name]()


def _onnx_label(name: str, head: str) -> str:
    """Of a folder; models of ours differ in their heads."""
    return f"{name}-head-{head}" if head != "i8" and name not in PEERS else name


def _ggufs(
    geometry: Geometry,
    storage: Storage,
    peers: Sequence[str],
    folder: Path,
    runtime: Runtime,
    threads: int,
    seed: int,
    ik: IkRuntime | None,
    progress: Progress,
) -> list[Contender]:
    """Ours in our backend, and the peers in llama.cpp as it is, or in ik_llama.cpp."""
    place = folder / f"{geometry.name}-gguf-{_slug(storage)}"
    size = ggufs.build_ours(geometry, storage, place, seed, progress)
    contenders = [Contender(OURS, place, size, runtime)]
    stock = runtime.baseline()
    for name in peers:
        if name in OURS_DENSE:
            place = folder / f"{geometry.name}-gguf-{name}"
            size = ggufs.build_ours(geometry, OURS_DENSE[name], place, seed, progress)
            contenders.append(Contender(name, place, size, runtime))
            continue
        place = folder / f"{geometry.name}-{name}"
        if ik and name in ik_package.PEERS:
            size = ggufs.build_ik_peer(geometry, name, place, seed, threads, ik.package, progress)
            contenders.append(Contender(name, place, size, ik, ik.footprint))
        else:
            size = ggufs.build_peer(geometry, name, place, seed, threads, progress)
            contenders.append(Contender(name, place, size, stock))
    return contenders


def ik_runtime(peers: Sequence[str], folder: Path | None) -> IkRuntime | None:
    """Where peers of ik_llama.cpp run; None if there are none. `MissingError` if it is not there."""
    if not set(peers) & set(ik_package.PEERS):
        return None
    return IkRuntime(ik_package.find_package(folder))


def _slug(storage: Storage) -> str:
    """E.g. bitmask-60-i4 or nm-2-4-i8, for a folder name."""
    return "-".join(re.findall(r"[a-z0-9.]+", storage.label))


def measure_contenders(
    contenders: Sequence[Contender],
    load: Load,
    threads: int,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Fill in footprints and samples; returns whether all models were open at the same time.

    Raises `ValueError` if a sequence would be longer than the models' context.
    """
    if load.longest > CONTEXT:
        raise ValueError(f"sequences of {load.longest} tokens do not fit the context of {CONTEXT}")
    steps = len(contenders) * (load.repetitions + 2)
    for done, contender in enumerate(contenders):
        progress(done, steps, f"memory of {contender.name}")
        contender.footprint = (
            contender.measure(contender.folder, threads)
            if contender.measure
            else measure_footprint(contender.runtime.name, contender.folder, threads=threads)
        )
    together = _fit(contenders)
    by_name = {contender.name: contender for contender in contenders}
    done = len(contenders)
    with _sessions(by_name, threads, together) as opened:
        for turn, name in enumerate(schedule(list(by_name), load.repetitions + 1, seed)):
            progress(done + turn, steps, f"timing {name}")
            warm = turn < len(contenders)
            with opened(name) as session:
                _repetition(by_name[name], session, load, seed, clock, warm=warm, fresh=not together)
    progress(steps, steps, "done")
    return together


def _repetition(
    contender: Contender,
    session: Session,
    load: Load,
    seed: int,
    clock: Callable[[], float],
    *,
    warm: bool,
    fresh: bool,
) -> None:
    """One decode and one prefill; in the first round, and after opening, a short one before it."""
    prompt = prompt_tokens(load.prompt_tokens, session.vocab_size, seed)
    long_prompt = prompt_tokens(load.prefill_tokens, session.vocab_size, seed)
    if warm or fresh:
        sample(session, long_prompt, 0, clock)
        sample(session, prompt, min(WARM_TOKENS, load.decode_tokens), clock)
    if warm:
        return
    time.sleep(SETTLE_SECONDS)
    decode = sample(session, prompt, load.decode_tokens, clock).decode_seconds
    prefill = sample(session, long_prompt, 0, clock).prefill_seconds
    contender.decode_rates.append(load.decode_tokens / decode)
    contender.prefill_rates.append(load.prefill_tokens / prefill)


@contextmanager
def _sessions(
    contenders: Mapping[str, Contender], threads: int, together: bool
) -> Iterator[Callable[[str], _Turn]]:
    """Gives a context with the session of a contender: one of many open ones, or opened for its turn."""
    with ExitStack() as stack:
        opened: dict[str, Session] = {}
        if together:
            for name, contender in contenders.items():
                opened[name] = contender.runtime.open(contender.folder, threads=threads)
                stack.callback(opened[name].close)

        def session(name: str) -> Session:
            contender = contenders[name]
            return opened[name] if together else contender.runtime.open(contender.folder, threads=threads)

        yield lambda name: _Turn(lambda: session(name), close=not together)


class _Turn:
    """A session for one turn."""

    def __init__(self, session: Callable[[], Session], *, close: bool) -> None:
        self._make, self._close = session, close
        self._session: Session | None = None

    def __enter__(self) -> Session:
        self._session = self._make()
        return self._session

    def __exit__(self, *error: object) -> None:
        if self._close and self._session is not None:
            self._session.close()
        self._session = None


def _fit(contenders: Sequence[Contender]) -> bool:
    """Whether the peaks of fresh processes, added up, fit into what is free now."""
    needed = sum(
        contender.footprint.peak_rss_bytes - contender.footprint.before_load_rss_bytes
        for contender in contenders
        if contender.footprint
    )
    return needed <= MEMORY_SHARE * psutil.virtual_memory().available
