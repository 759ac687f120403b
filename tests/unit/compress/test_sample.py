"""Text that a model writes itself: what is drawn, and that faster attention and caches change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from losa_deploy.compress.calibrate import kept_tokens
from losa_deploy.compress.decoder import Decoder
from losa_deploy.compress.device import Room
from losa_deploy.compress.key_cache import key_cache
from losa_deploy.compress.sample import GROUPED, Keep, arranged, draw_tokens, likely, sampled_tokens
from losa_deploy.compress.sample import _register_attention as register_attention
from losa_deploy.pretrained import cache_argument
from losa_deploy.progress import no_progress
from losa_deploy.recipe import CalibrationRecipe
from losa_deploy.sources.checkpoint import Checkpoint


@pytest.mark.parametrize("offset", [0, 250, 700])
def test_tokens_are_drawn_in_proportion_to_their_entries(offset: int) -> None:
    """Also where they lie in two of the groups that are summed up first, or in the last, shorter one."""
    entries = torch.zeros(20000, 706)
    entries[:, offset : offset + 6] = torch.tensor([0.0, 1.0, 0.0, 0.6, 0.4, 0.0])
    uniform = torch.rand(20000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = draw_tokens(entries, uniform)
    assert drawn.shape == (20000, 1)
    shares = torch.bincount(drawn.flatten(), minlength=706)[offset : offset + 6] / 20000
    # Four standard deviations of a share of one half.
    assert (shares - torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])).abs().max() < 4 * 0.5 / 20000**0.5
    assert not shares[[0, 2, 5]].any()


def test_the_same_numbers_draw_the_same_tokens_as_the_distribution_function() -> None:
    entries = torch.rand(300, 1000, generator=torch.Generator().manual_seed(2)) ** 8
    chances = torch.rand(300, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    drawn, uniform = draw_tokens(entries, chances), chances.numpy()
    running = entries.double().numpy().cumsum(axis=1)
    expected = [np.searchsorted(r, u * r[-1], side="right") for r, (u,) in zip(running, uniform, strict=True)]
    assert (drawn[:, 0].numpy() != np.array(expected)).sum() <= 1, "only a tie may fall the other way"


def test_unlikely_tokens_are_left_out_after_the_temperature() -> None:
    chances = likely(torch.log(torch.tensor([[0.5, 0.25, 0.2, 0.05]])), 0.5, 0.2)
    # Squared: 1, 0.25, 0.16 and 0.01 of the largest.
    assert chances[0].tolist() == pytest.approx([1.0, 0.25, 0.0, 0.0])
    assert likely(torch.zeros(1, 3), 1.0, 0.0).tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("kind", ["llama", "mistral", "opt"])
def test_attention_by_groups_is_the_same_attention(kind: str) -> None:
    """Grouped query heads, windows shorter than the text, and as many key heads as query heads."""
    import transformers

    shape = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    gated = {**shape, "intermediate_size": 48, "num_key_value_heads": 2}
    config = {
        "llama": lambda: transformers.LlamaConfig(**gated),
        "mistral": lambda: transformers.MistralConfig(**gated, sliding_window=4),
        "opt": lambda: transformers.OPTConfig(
            **shape, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32, pad_token_id=1
        ),
    }[kind]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    grouped = copy.deepcopy(model)
    register_attention()
    grouped.set_attn_implementation(GROUPED)
    tokens = torch.randint(2, 60, (3, 9))
    expected = model(input_ids=tokens).logits
    argument, found = {cache_argument(grouped): key_cache(2, 9)}, []
    for position in range(9):
        output = grouped(input_ids=tokens[:, position : position + 1], use_cache=True, **argument)
        found.append(output.logits[:, -1])
    assert torch.allclose(torch.stack(found, dim=1), expected, atol=1e-5)


def test_keys_and_values_lie_where_they_were_put_first() -> None:
    """Nothing is copied when a token is added, and what was there stays."""
    cache = key_cache(1, 5)
    one, two = torch.rand(2, 3, 2, 4), torch.rand(2, 3, 1, 4)
    keys, _ = cache.update(one, one, 0)
    more, values = cache.update(two, -two, 0)
    assert more.data_ptr() == keys.data_ptr()
    assert cache.get_seq_length() == 3
    assert torch.equal(more, torch.cat([one, two], dim=2))
    assert torch.equal(values, torch.cat([one, -two], dim=2))


def test_starts_are_kept_and_the_rest_follows_from_the_seed(tiny_llama: Path) -> None:
    source = Checkpoint.open(tiny_llama)
    recipe = CalibrationRecipe(samples=5, sequence_length=12, min_p=0.01)
    starts = [[7], [3, 4, 5]]
    one, two, other = (sampled(source, recipe, starts, seed) for seed in (0, 0, 1))
    assert one.shape == (5, 12)
    assert one[:, 0].tolist() == [7, 3, 7, 3, 7]
    assert one[1, :3].tolist() == [3, 4, 5]
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def sampled(
    source: Checkpoint, recipe: CalibrationRecipe, starts: list[list[int]], seed: int, memory: int = 10**11
) -> torch.Tensor:
    return sampled_tokens(source, recipe, starts, seed, "f32", no_progress, Room(memory=memory))


def test_less_memory_gives_the_same_text(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer sequences at a time, and weights in a file. Blocks are read to be packed, and for what is not."""
    source, recipe = Checkpoint.open(tiny_llama), CalibrationRecipe(samples=21, sequence_length=10)
    opened: list[int] = []
    load = Decoder.load_block
    monkeypatch.setattr(Decoder, "load_block", lambda d, block: (opened.append(block), load(d, block))[0])
    one = sampled(source, recipe, [[7], [3, 4]], 0)
    assert len(opened) == 2 * source.block_count
    two = sampled(source, recipe, [[7], [3, 4]], 0, memory=1)
    assert len(opened) == 4 * source.block_count
    assert torch.equal(one, two)


def test_a_part_that_was_kept_is_not_made_again(tmp_path: Path) -> None:
    """After a kill the third of three parts is made, and only the whole is left."""
    made: list[str] = []

    def part(name: str, value: int) -> Callable[[], torch.Tensor]:
        return lambda: (made.append(name), torch.full((2, 3), value))[1]

    def two(keep: Keep) -> torch.Tensor:
        keep("0-2", part("0-2", 1))
        keep("2-4", part("2-4", 2))
        raise KeyboardInterrupt

    def three(keep: Keep) -> torch.Tensor:
        return torch.cat([keep(f"{i}-{i + 2}", part(f"{i}-{i + 2}", 5)) for i in (0, 2, 4)])

    with pytest.raises(KeyboardInterrupt):
        kept_tokens(tmp_path, {"seed": 1}, two)
    whole = kept_tokens(tmp_path, {"seed": 1}, three)
    assert made == ["0-2", "2-4", "4-6"]
    assert whole[:, 0].tolist() == [1, 1, 2, 2, 5, 5]
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(kept_tokens(tmp_path, {"seed": 1}, two), whole)


def test_batches_are_the_parts_that_are_kept(tiny_llama: Path) -> None:
    source, recipe = Checkpoint.open(tiny_llama), CalibrationRecipe(samples=21, sequence_length=10)
    names: list[str] = []

    def keep(name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        names.append(name)
        return make()

    found = sampled_tokens(source, recipe, [[7]], 0, "f32", no_progress, Room(memory=1), keep)
    assert names == ["0-8", "8-16", "16-24"]
    assert torch.equal(found, sampled(source, recipe, [[7]], 0))


def test_progress_counts_parts_that_were_kept(tiny_llama: Path) -> None:
    source, recipe = Checkpoint.open(tiny_llama), CalibrationRecipe(samples=21, sequence_length=10)
    kept = {"0-8": torch.ones(8, 10, dtype=torch.int64)}
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int, _: str) -> None:
        steps.append((done, total))

    def keep(name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        return kept[name] if name in kept else make()

    sampled_tokens(source, recipe, [[7]], 0, "f32", progress, Room(memory=1), keep)
    assert steps == [(done, 27) for done in range(9, 28)]


@pytest.fixture
def same_threads() -> Iterator[None]:
    """Torch has as many threads afterwards as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("same_threads")
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_any_number_of_threads_writes_the_same_text(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    source, recipe = Checkpoint.open(tiny_llama), CalibrationRecipe(samples=40, sequence_length=8)
    expected = sampled(source, recipe, [[7]], 0, memory=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int, what: str) -> None:
        assert what == "sampling calibration text"
        steps.append((done, total))

    found = sampled_tokens(source, recipe, [[7]], 0, "f32", progress, Room())
    assert torch.equal(found, expected)
    parts = {1: 1, 2: 2, 16: 4}[threads]
    assert steps == [(done, 7 * parts) for done in range(1, 7 * parts + 1)]


@pytest.mark.usefixtures("same_threads")
def test_an_error_of_one_thread_ends_the_others(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = Checkpoint.open(tiny_llama), CalibrationRecipe(samples=16, sequence_length=60)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    steps = 0

    def progress(done: int, total: int, what: str) -> None:
        nonlocal steps
        steps = done

    def keep(name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name == "0-8":
            raise OSError("disk full")
        return make()

    with pytest.raises(OSError, match="disk full"):
        sampled_tokens(source, recipe, [[7]], 0, "f32", progress, Room(), keep)
    assert steps < 59


@pytest.mark.parametrize(
    ("packed", "samples", "threads", "sequences", "expected"),
    [
        (True, 128, 2, 1000, (64, 2)),
        (True, 128, 1, 1000, (64, 1)),
        (True, 300, 2, 1000, (64, 2)),
        (True, 128, 16, 1000, (32, 4)),
        (True, 5, 16, 1000, (5, 1)),
        (True, 128, 2, 40, (20, 2)),
        (True, 128, 4, 20, (10, 2)),
        (True, 128, 4, 0, (8, 1)),
        (False, 300, 16, 1000, (128, 1)),
        (False, 300, 16, 30, (30, 1)),
    ],
)
def test_sequences_are_shared_out_as_memory_allows(
    packed: bool, samples: int, threads: int, sequences: int, expected: tuple[int, int]
) -> None:
    assert arranged(packed, samples, threads, 50 + 3 * sequences, 50, 3) == expected
