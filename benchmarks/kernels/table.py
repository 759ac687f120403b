"""How fast the kernels are on one large matrix, beside what the memory can deliver.

Every row of the table is one layout, value type, sparsity, target, thread count and number of tokens.
A pass multiplies by so many copies of the matrix that they do not fit into the caches. All rows take
turns in several rounds, and the memory is measured in each round too, so that a change of the machine's
clock or load meets all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from losa_deploy import _native
from losa_deploy.layouts import LAYOUTS, VALUE_TYPES, PackedTensor, bitmask
from losa_deploy.progress import Progress, no_progress

from ..document import SCHEMA, machine_record
from ..synthetic.tensors import Storage, layout_of_pattern, native_description, random_packed

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
DEFAULT_CACHE_BYTES = 32 << 20
"""Where the system does not tell the size of its last level cache."""
OUT_OF_CACHE = 4
"""A pass reads at least so many times the last level cache."""
MOST_COPIES = 512
"""So many copies of a small matrix may fit into the caches; `bytes_per_pass` shows it."""
ROUNDS = 5
DECODE_SHARE = 4
"""Time for one token on a target other than scalar, compared with other rows."""
BANDWIDTH_SECONDS = 0.5
"""Several passes over what does not fit into a server's caches; the first one is slow."""
TRIAL_ROWS = 16
ROW_STEP = 16
"""LOSA_ROW_STEP of the kernels."""
ALIGNMENT = 64


@dataclass(frozen=True)
class KernelPlan:
    """What is measured."""

    rows: int
    columns: int
    storages: tuple[Storage, ...]
    targets: tuple[str, ...]
    threads: tuple[int, ...]
    tokens: tuple[int, ...] = (1, 64)
    seconds: float = 100.0
    """Time for all rows of the table together; packing comes on top."""
    cache_bytes: int = 0
    """Last level cache; 0: ask the system."""
    seed: int = 0

    @property
    def cases(self) -> tuple[tuple[str, int, int], ...]:
        """(target, threads, tokens) of every row of one storage."""
        return tuple((target, t, n) for n in self.tokens for target in self.targets for t in self.threads)

    def visit_seconds(self, target: str, tokens: int) -> float:
        """Time of one row in one round: more for decoding with real kernels, which is what counts."""
        shares = {case: self._share(case[0], case[2]) for case in self.cases}
        of_all = self._share(target, tokens) / sum(shares.values())
        return self.seconds / (ROUNDS * len(self.storages)) * of_all

    @staticmethod
    def _share(target: str, tokens: int) -> int:
        return DECODE_SHARE if tokens == 1 and target != "scalar" else 1


@dataclass
class KernelRow:
    """One row of the table; `passes` grows round by round."""

    storage: Storage
    target: str
    threads: int
    tokens: int
    packed_bytes: int
    copies: int
    rows_timed: int = 0
    """Rows of each copy that a pass computes: all, or fewer where a pass would take too long. Then the
    kernel is bound by arithmetic, and it no longer matters that fewer bytes are read."""
    passes: list[float] = field(default_factory=list)
    """Seconds."""

    def rates(self, plan: KernelPlan) -> list[float]:
        """Dense positions per second of each pass: rows x columns x tokens."""
        work = self.copies * self.rows_timed * plan.columns * self.tokens
        return [work / seconds for seconds in self.passes]


@dataclass(frozen=True)
class KernelTable:
    """All rows, and the memory's best read rate per thread count (median over the rounds)."""

    plan: KernelPlan
    rows: tuple[KernelRow, ...]
    read_bandwidth: Mapping[int, float]
    """Threads → bytes per second."""

    def records(self) -> list[dict[str, object]]:
        """Rows of the JSON document."""
        return [self.record(row) for row in self.rows]

    def record(self, row: KernelRow) -> dict[str, object]:
        """One row with its rates; `weights_per_second` counts dense positions, once per token."""
        plan, storage = self.plan, row.storage
        rates = row.rates(plan)
        weights = median(rates)
        # With several tokens a pass reads the weights once and uses them once per token.
        read = weights / row.tokens * row.packed_bytes / (plan.rows * plan.columns)
        bandwidth = self.read_bandwidth[row.threads]
        pattern = f"{storage.pattern[0]}:{storage.pattern[1]}" if storage.pattern else None
        return {
            "layout": storage.layout,
            "pattern": pattern,
            "value_type": storage.value_type,
            "sparsity": storage.sparsity,
            "target": row.target,
            "threads": row.threads,
            "tokens": row.tokens,
            "rows": plan.rows,
            "columns": plan.columns,
            "stored_bytes": row.packed_bytes,
            "bits_per_weight": 8 * row.packed_bytes / (plan.rows * plan.columns),
            "bytes_per_pass": int(row.copies * row.packed_bytes * row.rows_timed / plan.rows),
            "weights_per_second": weights,
            "weights_per_second_per_thread": weights / row.threads,
            "bytes_per_second": read,
            "read_bandwidth_bytes_per_second": bandwidth,
            "share_of_read_bandwidth": read / bandwidth,
            "samples": rates,
        }


def default_storages(
    layouts: Sequence[str], value_types: Sequence[str], sparsities: Sequence[float]
) -> tuple[Storage, ...]:
    """Every combination: `layouts` are dense, bitmask and pair (each sparsity), sliding and patterns as 2:4.

    `pair` is a bitmask whose rows share their masks in pairs.
    """
    found: list[Storage] = []
    for layout in layouts:
        for value_type in value_types:
            of_layout = _storages_of(layout, value_type, sparsities)
            found += [s for s in of_layout if LAYOUTS[s.layout].stores(VALUE_TYPES[s.value_type])]
    return tuple(found)


def _storages_of(layout: str, value_type: str, sparsities: Sequence[float]) -> Iterator[Storage]:
    if layout == "dense":
        yield Storage("dense", value_type)
    elif layout == "sliding":
        yield Storage("sliding", value_type, 0.5)
    elif layout == "bitmask":
        yield from (Storage("bitmask", value_type, sparsity) for sparsity in sparsities)
    elif layout == "pair":
        if bitmask.can_share(VALUE_TYPES[value_type]):
            yield from (Storage("bitmask", value_type, sparsity, paired=True) for sparsity in sparsities)
    else:
        n, m = (int(part) for part in layout.split(":"))
        yield Storage(layout_of_pattern((n, m), value_type), value_type, 1 - n / m, (n, m))


def measure_kernels(
    plan: KernelPlan,
    *,
    progress: Progress = no_progress,
    clock: Callable[[], float] = time.perf_counter,
) -> KernelTable:
    """Time all rows of the plan; afterwards the kernels are chosen again by the machine."""
    cache = plan.cache_bytes or last_level_cache()
    shape = (plan.rows, plan.columns)
    steps = (ROUNDS + 1) * len(plan.storages)
    tensors: list[PackedTensor] = []
    for index, storage in enumerate(plan.storages):
        progress(index, steps, f"packing {storage.label}")
        tensors.append(random_packed(shape, storage, plan.seed))
    wanted = [math.ceil(OUT_OF_CACHE * cache / tensor.nbytes) for tensor in tensors]
    copies = [max(1, min(MOST_COPIES, number)) for number in wanted]
    arena = Arena(max(n * Arena.room(tensor) for n, tensor in zip(copies, tensors, strict=True)))
    rows = [
        [KernelRow(storage, *case, tensor.nbytes, n) for case in plan.cases]
        for storage, tensor, n in zip(plan.storages, tensors, copies, strict=True)
    ]
    bandwidth: dict[int, list[float]] = {threads: [] for threads in plan.threads}
    try:
        for turn in range(ROUNDS):
            for threads in plan.threads:
                size = max(arena.size, OUT_OF_CACHE * cache)
                bandwidth[threads].append(_native.read_bandwidth(size, threads, BANDWIDTH_SECONDS))
            for index, tensor in enumerate(tensors):
                label = f"round {turn + 1}, {plan.storages[index].label}"
                progress((turn + 1) * len(tensors) + index, steps, label)
                timer = _native.MatmulTimer(arena.copies(tensor, copies[index]))
                for row in rows[index]:
                    _visit(timer, row, plan)
    finally:
        _native.set_target("")
    progress(steps, steps, "done")
    best = {threads: median(found) for threads, found in bandwidth.items()}
    return KernelTable(plan, tuple(row for group in rows for row in group), best)


def _visit(timer: _native.MatmulTimer, row: KernelRow, plan: KernelPlan) -> None:
    """Passes for about `visit_seconds`, at least one; the first visit finds out how long one takes."""
    _native.set_target(row.target)
    budget = plan.visit_seconds(row.target, row.tokens)
    if not row.rows_timed:
        trial = min(plan.rows, TRIAL_ROWS * row.threads)
        seconds = min(timer.time(row.tokens, row.threads, 2, trial))
        # Half of the time: every visit has a pass that does not count.
        fitting = int(trial * budget / 2 / max(seconds, 1e-9)) // ROW_STEP * ROW_STEP
        row.rows_timed = (
            plan.rows if fitting >= plan.rows else max(min(trial, ROW_STEP * row.threads), fitting)
        )
    rows = 0 if row.rows_timed == plan.rows else row.rows_timed
    first = timer.time(row.tokens, row.threads, 1, rows)
    more = min(64, int(budget / max(first[0], 1e-9)))
    # The first pass after another row has cold branch predictors and, at first, a resting clock.
    row.passes += timer.time(row.tokens, row.threads, max(1, more - 1), rows)


class Arena:
    """Memory for the copies of one tensor at a time, allocated once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._bytes: NDArray[np.uint8] = np.empty(size + ALIGNMENT, np.uint8)
        self._start = -self._bytes.ctypes.data % ALIGNMENT

    @staticmethod
    def room(packed: PackedTensor) -> int:
        """Bytes of one copy, each component padded."""
        return sum(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in packed.arrays.values())

    def copies(self, packed: PackedTensor, count: int) -> list[dict[str, int | NDArray[np.uint8]]]:
        """`count` descriptions for the native timer, each with bytes of its own; overwrites older ones."""
        original = native_description(packed)
        at, found = self._start, []
        for _ in range(count):
            description = dict(original)
            for key, value in original.items():
                if isinstance(value, np.ndarray):
                    description[key] = view = self._bytes[at : at + value.nbytes]
                    view[:] = value
                    at += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
            found.append(description)
        return found


def last_level_cache() -> int:
    """Bytes of the largest cache that the first CPU sees."""
    folder = CACHES
    sizes = [DEFAULT_CACHE_BYTES] if not folder.is_dir() else []
    for file in folder.glob("index*/size"):
        try:
            text = file.read_text("ascii").strip()
            sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1:], 0))
        except (OSError, ValueError):
            continue
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def kernel_document(table: KernelTable) -> dict[str, object]:
    """The document of the table."""
    plan = asdict(table.plan)
    return {
        "schema": SCHEMA,
        "machine": machine_record(),
        "targets": list(table.plan.targets),
        "read_bandwidth_bytes_per_second": {str(t): v for t, v in table.read_bandwidth.items()},
        "settings": {key: plan[key] for key in ("rows", "columns", "threads", "tokens", "seconds", "seed")},
        "results": table.records(),
    }
