"""Perplexity, order of samples, fresh-process memory and environment, on cases done by hand."""

import math
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from losa_deploy.benchmarks import environment, memory
from losa_deploy.benchmarks.accuracy import (
    negative_log_likelihoods,
    perplexity,
    split_windows,
    summarize,
)
from losa_deploy.benchmarks.latency import measure_latency, schedule
from losa_deploy.benchmarks.workloads import QUICK, Workload
from losa_deploy.errors import InputError, LosaError, ResourceError

HALF = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]], np.float32))


class BigramSession:
    """A language model whose next-token logits depend on the last token only: row `token` of a table."""

    def __init__(self, table: NDArray[np.float32]) -> None:
        self.table = table
        self.vocab_size = len(table)
        self.calls: list[str] = []
        self.closed = False

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self.table[list(tokens)]

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        self.calls.append(f"prefill {len(tokens)}")
        return self.table[tokens[-1]]

    def step(self, token: int) -> NDArray[np.float32]:
        self.calls.append("step")
        return self.table[token]

    def close(self) -> None:
        self.closed = True


def test_likelihoods_of_a_known_distribution() -> None:
    found = negative_log_likelihoods(HALF[[0, 0, 1]], [0, 0, 1])
    assert found == pytest.approx(np.array([math.log(2), math.log(4)]))


def test_perplexity_and_standard_error_by_hand() -> None:
    windows = [[0, 0, 1], [2, 2, 2]]
    found = perplexity(BigramSession(HALF), windows, 3)
    losses = [math.log(2), math.log(4), math.log(2), math.log(2)]
    mean = sum(losses) / 4
    assert found.perplexity == pytest.approx(math.exp(mean))
    variance = sum((x - mean) ** 2 for x in losses) / 3
    assert found.stderr == pytest.approx(math.exp(mean) * math.sqrt(variance / 4))
    means = [(losses[0] + losses[1]) / 2, losses[2]]
    of_windows = math.sqrt(sum((m - mean) ** 2 for m in means) / 1 / 2)
    assert found.stderr_windows == pytest.approx(math.exp(mean) * of_windows)
    assert (found.tokens, found.window, found.windows) == (4, 3, 2)


def test_every_token_weighs_the_same_when_the_last_window_is_short() -> None:
    found = summarize([np.array([1.0, 1.0, 1.0]), np.array([3.0])], 4)
    assert found.perplexity == pytest.approx(math.exp(1.5))


def test_likelihoods_agree_over_piece_borders() -> None:
    tokens = list(np.random.default_rng(1).integers(0, 3, 200))
    logits = HALF[tokens]
    expected = [-float(HALF[a][b]) for a, b in pairwise(tokens)]
    assert negative_log_likelihoods(logits, tokens) == pytest.approx(np.array(expected), rel=1e-6)


def test_windows_cover_the_text_once_and_carry_the_start_token() -> None:
    assert split_windows([1, 2, 3, 4, 5, 6, 7, 8], 3) == [[1, 2, 3], [4, 5, 6], [7, 8]]
    assert split_windows([1, 2, 3, 4], 3) == [[1, 2, 3]]
    assert split_windows([1, 2, 3], 3, start=0) == [[0, 1, 2], [0, 3]]
    with pytest.raises(InputError, match="1 tokens, too few"):
        split_windows([1], 8)


def test_order_is_shuffled_complete_and_repeatable() -> None:
    order = schedule(["a", "b", "c"], 20, seed=3)
    assert order == schedule(["a", "b", "c"], 20, seed=3)
    assert order != schedule(["a", "b", "c"], 20, seed=4)
    rounds = [order[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_latency_counts_tokens_drops_the_warm_up_and_closes() -> None:
    sessions = {"fast": BigramSession(HALF), "slow": BigramSession(HALF)}
    ticks = iter(range(1_000_000))
    workload = Workload("tiny", prompt_tokens=8, decode_tokens=2, samples=3, warmup=1)
    pauses: list[float] = []
    found = measure_latency(
        {"fast": lambda: sessions["fast"], "slow": lambda: sessions["slow"]},
        workload,
        seed=1,
        clock=lambda: float(next(ticks)),
        settle=pauses.append,
    )
    assert sessions["fast"].calls == ["prefill 8", "step", "step"] * 4
    assert sessions["fast"].closed and sessions["slow"].closed
    assert len(found["fast"].samples) == 3
    assert found["fast"].prefill_tokens_per_second == 8.0
    assert found["slow"].decode_rates == (2.0, 2.0, 2.0)
    assert found["slow"].decode_spread == 0.0
    assert len(pauses) == 8


def test_a_workload_is_cut_to_the_context() -> None:
    assert QUICK.fits(1 << 20) == QUICK
    small = QUICK.fits(40)
    assert small.prompt_tokens + small.decode_tokens <= 40


def probe_command(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_child_killed_by_the_system_is_reported_as_out_of_memory() -> None:
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    with pytest.raises(ResourceError, match="out of memory"):
        memory.run_probe(probe_command(code), Path("model"), 30)


def test_a_failing_child_is_reported_with_its_message() -> None:
    code = 'import sys; sys.stderr.write(\'{"message": "no such model"}\'); sys.exit(3)'
    with pytest.raises(LosaError, match="exit code 3: no such model"):
        memory.run_probe(probe_command(code), Path("model"), 30)


def test_the_peak_is_the_childs_own_and_not_inherited() -> None:
    ballast = np.ones(60_000_000)
    code = (
        "from losa_deploy.benchmarks.probe import peak_rss_bytes as p; import json, numpy as np; b = p();"
        "np.ones(25_000_000); print(json.dumps(dict(peak_rss_bytes=p(), before_load_rss_bytes=b,"
        "load_seconds=0, prefill_seconds=0, decode_seconds=0)))"
    )
    found = memory.run_probe(probe_command(code), Path("model"), 60)
    assert ballast.nbytes > 400e6
    assert found.before_load_rss_bytes < 200e6
    assert 190e6 <= found.peak_rss_bytes - found.before_load_rss_bytes < 300e6


def test_environment_names_this_machine_and_reads_cpuinfo() -> None:
    found = environment.collect()
    assert found.cores >= 1 and found.ram_bytes > 2**28
    assert "numpy" in found.versions
    text = "processor\t: 0\nmodel name\t: Some CPU 3000\nflags\t\t: fpu sse avx2 fma\n"
    assert environment.cpu_name(text) == "Some CPU 3000"
    assert environment.cpu_flags(text) == ("avx2", "fma")
