"""Both sides of every branch of the verdict."""

from dataclasses import replace

import pytest

from losa_deploy.benchmarks.report.verdict import Evidence, decide
from losa_deploy.benchmarks.rival_verdict import Match, Side, quality_advice, speed_advice

GOOD = Evidence(
    value_type="i4",
    exported_bytes=60_000_000,
    dense_same_type_bytes=80_000_000,
    dense_bytes=540_000_000,
    block_bits_per_weight=3.1,
    packed=True,
    runtime="ort",
    kernels="avx2",
    exported_decode=30.0,
    dense_decode=20.0,
    decode_noise=0.05,
    exported_rss=300_000_000,
    dense_rss=600_000_000,
    dense_perplexity=20.0,
    merged_perplexity=30.0,
    exported_perplexity=30.3,
    merged_perplexity_stderr=0.5,
)


def line(evidence: Evidence, index: int) -> str:
    return decide(evidence).lines[index]


def test_smaller_and_faster() -> None:
    verdict = decide(GOOD)
    assert verdict.smaller and verdict.faster
    assert verdict.lines[0].startswith("Smaller: 60.0 MB, 0.75× a dense i4 export (80.0 MB), 0.11×")
    assert verdict.lines[1].startswith("Faster: decode 30.0 against 20.0 tokens/s dense f32 in ort (1.50×")
    assert "native kernels" not in " ".join(verdict.lines)


def test_not_smaller_names_the_price_of_positions_or_the_dense_layout() -> None:
    larger = replace(GOOD, exported_bytes=81_000_000)
    assert not decide(larger).smaller
    assert "positions of the kept weights cost as much" in line(larger, 0)
    equal = replace(GOOD, exported_bytes=80_000_000)
    assert not decide(equal).smaller
    assert "every linear is stored dense" in line(equal, 0)


def test_the_type_of_the_dense_baseline_is_named() -> None:
    lines = decide(replace(GOOD, dense_type="f16")).lines
    assert "0.11× the dense f16 one" in lines[0]
    assert "20.0 tokens/s dense f16 in ort" in lines[1] and lines[2].endswith("dense f16.")


def test_smaller_than_its_dense_type_but_not_than_f32_is_not_smaller() -> None:
    assert not decide(replace(GOOD, exported_bytes=70_000_000, dense_bytes=65_000_000)).smaller


@pytest.mark.parametrize(
    ("decode", "noise", "faster", "word"),
    [
        (20.5, 0.0, True, "Faster"),
        (20.3, 0.0, False, "Not faster here"),
        (21.0, 0.10, False, "Not faster here"),
        (19.7, 0.0, False, "Not faster here"),
        (19.0, 0.0, False, "Slower here"),
        (19.0, 0.10, False, "Not faster here"),
    ],
)
def test_speed_is_judged_beyond_noise(decode: float, noise: float, faster: bool, word: str) -> None:
    evidence = replace(GOOD, exported_decode=decode, decode_noise=noise)
    assert decide(evidence).faster is faster
    assert line(evidence, 1).startswith(word)


def test_a_slow_model_is_told_why() -> None:
    slow = replace(GOOD, exported_decode=10.0)
    reads = "This model reads 0.6 GB/s of weights with the avx2 kernels, the dense one 10.8 GB/s"
    assert f"{reads}: the kernels are bound by computing" in line(slow, 1)
    assert "no fewer bytes to read" in line(replace(slow, exported_bytes=1_080_000_000), 1)
    assert "stays in the CPU's caches" in line(replace(slow, dense_bytes=32_000_000), 1)
    stock = replace(slow, runtime="ort-stock", kernels="")
    assert "ort-stock expands packed weights when it loads them" in line(stock, 1)
    assert "Every linear is stored dense" in line(replace(slow, packed=False), 1)


@pytest.mark.parametrize(
    ("rss", "word"), [(580e6, "Less"), (590e6, "As much"), (610e6, "As much"), (620e6, "More")]
)
def test_memory(rss: float, word: str) -> None:
    assert line(replace(GOOD, exported_rss=int(rss)), 2).startswith(f"{word} memory")


def test_quality_separates_sparsity_from_rounding() -> None:
    found = line(GOOD, 3)
    assert "20.00 dense, 30.00 ± 0.50 merged (1.50×), 30.30 exported (+1.0% from i4)" in found
    unknown = line(replace(GOOD, dense_perplexity=None), 3)
    assert "dense model was not at hand" in unknown and "×" not in unknown


@pytest.mark.parametrize("bits", [1.5, 3.14, 3.2, 3.99, 4.0, 8.6])
def test_no_size_alone_makes_a_format_the_better_one(bits: float) -> None:
    missing = "llama-cpp-python is not installed"
    found = line(replace(GOOD, block_bits_per_weight=bits, rival_missing=missing), 4)
    assert found == (
        f"A dense 4-bit file of the same model: not measured, {missing}. "
        f"Blocks here take {bits:.2f} bits per weight."
    )


OURS = Side("this file", 80_000_000, 50.0, 110.0, 500.0, 300_000_000)
Q4_0 = Side("Q4_0", 90_000_000, 45.0, 95.0, 400.0, 200_000_000)
MATCH = Match(OURS, Q4_0, loss_difference=0.1, loss_error=0.01, decode_noise=0.03)


def test_the_rivals_numbers_stand_beside_ours() -> None:
    found = line(replace(GOOD, rival=MATCH), 4)
    assert found.startswith(
        "Q4_0 of the same model in llama.cpp: 90.0 MB, perplexity 45.00, decode 95.0 and prefill 400 "
        "tokens/s, peak 200 MB; this file: 80.0 MB, perplexity 50.00, decode 110.0 and prefill 500 "
        "tokens/s, peak 300 MB. "
    )


@pytest.mark.parametrize(
    ("ours", "difference", "expected"),
    [
        (
            80,
            0.1,
            "neither wins: take Q4_0 for quality (0.100 ± 0.010 nats per token better), this file for size",
        ),
        (80, -0.1, "take this file: 11% smaller and 0.100 ± 0.010 nats per token better"),
        (100, 0.1, "take Q4_0: 10% smaller and 0.100 ± 0.010 nats per token better"),
        (
            100,
            -0.1,
            "neither wins: take this file for quality (0.100 ± 0.010 nats per token better), Q4_0 for size",
        ),
        (90, -0.1, "take this file: 0.100 ± 0.010 nats per token better"),
        (90, 0.1, "take Q4_0: 0.100 ± 0.010 nats per token better"),
        (80, 0.019, "take this file: 11% smaller, the losses differ by no more than chance"),
        (100, -0.019, "take Q4_0: 10% smaller, the losses differ by no more than chance"),
        (90, 0.019, "either: both have the same size, the losses differ by no more than chance"),
    ],
)
def test_which_file_has_more_quality_per_byte(ours: int, difference: float, expected: str) -> None:
    match = replace(MATCH, ours=replace(OURS, bytes=ours * 1_000_000), loss_difference=difference)
    assert quality_advice(match).removeprefix("For quality per byte ").startswith(expected)


@pytest.mark.parametrize(
    ("decode", "noise", "expected"),
    [
        (110.0, 0.03, "for speed take this file: decode 1.16×"),
        (80.0, 0.03, "for speed take Q4_0: decode 1.19×"),
        (96.0, 0.0, "for speed either: decode differs by less than the noise of ±2%"),
        (110.0, 0.2, "for speed either: decode differs by less than the noise of ±20%"),
        (80.0, 0.2, "for speed either: decode differs by less than the noise of ±20%"),
    ],
)
def test_which_file_is_faster(decode: float, noise: float, expected: str) -> None:
    assert speed_advice(replace(MATCH, ours=replace(OURS, decode=decode), decode_noise=noise)) == expected


def test_a_dense_model_that_was_not_run_is_no_measure_of_speed_or_memory() -> None:
    verdict = decide(replace(GOOD, dense_decode=None, dense_rss=None, dense_missing="it needs 28.0 GB"))
    assert verdict.faster is None and verdict.smaller
    assert verdict.lines[1] == "Speed: decode 30.0 tokens/s. The dense model was not run: it needs 28.0 GB."
    assert verdict.lines[2] == "Memory: peak 300.0 MB."
