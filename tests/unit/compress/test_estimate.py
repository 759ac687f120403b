"""What a compression is expected to take, for the sizes that the docs name and at the edges of memory."""

from __future__ import annotations

import dataclasses

import pytest

from losa_deploy.compress.estimate import Geometry, estimate
from losa_deploy.compress.rates import Rates
from losa_deploy.compress.teacher import CHUNK_TOKENS
from losa_deploy.recipe import load_recipe

RATES = Rates(products=4e11, plain=1.6e11, blocks=2.5e11, elements=2.5e9, moved=4e7)
GIB = 2**30


def llama(
    blocks: int, hidden: int, inner: int, keys: int, vocabulary: int, *, tied: bool = False
) -> Geometry:
    """As a Hugging Face folder names it."""
    rows = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    linears = {
        **{f"model.layers.0.self_attn.{name}": (size, hidden) for name, size in rows.items()},
        "model.layers.0.mlp.gate_proj": (inner, hidden),
        "model.layers.0.mlp.up_proj": (inner, hidden),
        "model.layers.0.mlp.down_proj": (hidden, inner),
    }
    others = {name: (vocabulary, hidden) for name in (["embed"] if tied else ["embed", "lm_head"])}
    return dataclasses.replace(Geometry.of(linears, others), blocks=blocks)


SMOLLM = llama(30, 576, 1536, 192, 49152, tied=True)
TINYLLAMA = llama(22, 2048, 5632, 256, 32000)
LLAMA_7B = llama(32, 4096, 11008, 4096, 32000)
LLAMA_70B = llama(80, 8192, 28672, 1024, 128256)


@pytest.mark.parametrize(
    ("shape", "memory", "most"),
    [(SMOLLM, 20, 2.5), (TINYLLAMA, 6, 6), (LLAMA_7B, 14, 14), (LLAMA_70B, 48, 48)],
    ids=["135M", "1.1B", "7B", "70B"],
)
def test_quick_stays_within_the_memory_it_is_given(shape: Geometry, memory: int, most: float) -> None:
    for bf16 in (True, False):
        found = estimate(shape, load_recipe(), memory * GIB, RATES, bf16=bf16)
        assert found.peak_ram_bytes <= most * GIB, bf16
        assert found.peak_ram_bytes == max(found.stages.values())


def test_the_shapes_are_those_of_the_files() -> None:
    assert (SMOLLM.hidden, SMOLLM.inner, SMOLLM.key_width, SMOLLM.vocabulary) == (576, 1536, 192, 49152)
    assert SMOLLM.weights == 3_538_944 and SMOLLM.all == 134_479_872
    found = Geometry.of(
        {"blk.0.attn_k.weight": (4, 8), "blk.1.attn_k.weight": (6, 8)}, {"token_embd": (9, 8)}
    )
    assert (found.blocks, found.key_width, found.weights, found.outer) == (2, 6, 48, 72)


def test_more_of_everything_takes_more() -> None:
    base = estimate(TINYLLAMA, load_recipe(), 10 * GIB, RATES, bf16=True)
    for key, value in {"calibration.samples": 512, "phases.0.window": 2}.items():
        more = estimate(TINYLLAMA, load_recipe(overrides=[(key, value)]), 10 * GIB, RATES, bf16=True)
        assert more.stages["blocks"] > base.stages["blocks"], key
        assert more.seconds > base.seconds, key
    slower = estimate(TINYLLAMA, load_recipe(), 10 * GIB, Rates(1e11, 4e10, 6e10, 1e9, 1e7), bf16=True)
    assert slower.seconds > 2 * base.seconds and slower.peak_ram_bytes == base.peak_ram_bytes


def test_a_phase_that_trains_all_weights_needs_them_in_memory() -> None:
    """f32 weights, masks, gradients and two moments of 7B: 17 bytes for each, more where there is room."""
    plenty = estimate(LLAMA_7B, load_recipe(preset="standard"), 300 * GIB, RATES, bf16=True)
    found = estimate(LLAMA_7B, load_recipe(preset="standard"), 14 * GIB, RATES, bf16=True)
    weights = LLAMA_7B.blocks * LLAMA_7B.weights
    assert 17 * weights < found.stages["phase 1"] < 20 * weights
    assert plenty.stages["phase 1"] > found.stages["phase 1"] + 4 * weights
    assert found.disk_bytes > 20 * weights
    assert (
        estimate(TINYLLAMA, load_recipe(preset="standard"), 20 * GIB, RATES, bf16=True).peak_ram_bytes
        < 20 * GIB
    )


def test_little_memory_is_used_up_block_by_block() -> None:
    norms = {"train": ["norms"], "where": "model", "grid": "export", "tokens": 40960, "batch_size": 4}
    blocks = {"train": ["weights", "scales"], "grid": "export"}
    recipe = load_recipe(overrides=[("phases", [blocks, norms])])
    plenty = estimate(LLAMA_7B, recipe, 100 * GIB, RATES, bf16=True)
    little = estimate(LLAMA_7B, recipe, 10 * GIB, RATES, bf16=True)
    for stage in ("text", "phase 1"):
        assert little.stages[stage] < 0.5 * plenty.stages[stage], stage
    assert little.stages["check"] == plenty.stages["check"] < little.stages["blocks"]
    # What the streams lack in memory lies on the disk.
    assert little.stages["blocks"] == 10 * GIB < plenty.stages["blocks"]
    in_files = plenty.stages["blocks"] - little.stages["blocks"]
    assert little.disk_bytes == plenty.disk_bytes + in_files


def test_processes_share_samples_batches_and_weights() -> None:
    recipe = load_recipe(preset="standard", overrides=[("phases.0.batch_size", 8)])
    found = {n: estimate(LLAMA_7B, recipe, 60 * GIB, RATES, bf16=True, processes=n) for n in (1, 4, 8)}
    for few, many in ((1, 4), (4, 8)):
        assert found[many].seconds < found[few].seconds
        for stage in ("blocks", "text", "phase 1"):
            assert found[many].stages[stage] < found[few].stages[stage], (stage, many)
    assert found[8].seconds > found[1].seconds / 8  # not all of it is shared
    weights = 17 * LLAMA_7B.blocks * LLAMA_7B.weights
    assert found[1].stages["phase 1"] > weights > 60 * GIB
    assert weights / 8 < found[8].stages["phase 1"] < weights / 4


def test_more_steps_on_the_same_tokens_take_longer() -> None:
    """Each step rounds and moves all weights of a block."""
    few, many = (
        estimate(SMOLLM, load_recipe(overrides=[("phases.0.batch_size", size)]), 20 * GIB, RATES, bf16=True)
        for size in (4, 2)
    )
    assert many.seconds > 1.3 * few.seconds


def test_a_cached_teacher_takes_its_tokens_instead_of_the_dense_model() -> None:
    """Of other text the model itself, of the calibration its last states: both are gone."""
    weights, tokens = LLAMA_7B.blocks * LLAMA_7B.weights, 1_920_000
    noted = (8 * 32 + 4) * tokens
    changes: list[tuple[str, object]] = [("phases.1.top_k", 32)]
    text: list[tuple[str, object]] = [("phases.1.data", [{"source": "text.txt"}])]
    states, streams = 2 * 4 * 256 * 256 * 4096, 2 * 4 * CHUNK_TOKENS * 4096
    for more, gone, here in (
        (text, 4 * weights, noted + streams),
        ([], states, (8 * 32 + 4) * 256 * 256),
    ):
        found = {
            kind: estimate(
                LLAMA_7B,
                load_recipe(preset="standard", overrides=[*changes, *more, ("phases.1.teacher", kind)]),
                memory * GIB, RATES, bf16=True,
            )
            for kind, memory in (("resident", 300), ("cached", 300), ("auto", 300))
        }  # fmt: skip
        stage = {kind: each.stages["phase 1"] for kind, each in found.items()}
        assert stage["resident"] - stage["cached"] == gone - here
        assert stage["auto"] == stage["resident"]
    # What is noted lies in a file where training leaves no room for it, and memory decides whether it is.
    recipe = load_recipe(preset="standard", overrides=[*changes, *text])
    short = estimate(LLAMA_7B, recipe, 60 * GIB, RATES, bf16=True)
    plain = load_recipe(preset="standard", overrides=[*text, ("phases.1.loss", {"kl": 0.0})])
    without = estimate(LLAMA_7B, plain, 60 * GIB, RATES, bf16=True)
    assert short.stages["phase 1"] == without.stages["phase 1"]
    assert short.disk_bytes == without.disk_bytes + noted + streams


def test_streams_in_bf16_take_half() -> None:
    found = [
        estimate(LLAMA_7B, load_recipe(overrides=[("streams", kind)]), 60 * GIB, RATES, bf16=True).stages
        for kind in ("f32", "bf16")
    ]
    assert found[0]["blocks"] - found[1]["blocks"] == 5 * 2 * 128 * 256 * 4096
