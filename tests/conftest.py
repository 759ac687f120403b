"""Shared fixtures: one tiny Llama, trained for seconds on made-up text, that every quick test can use."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from numpy.typing import NDArray

settings.register_profile("any load", deadline=None)  # a busy machine makes no test wrong
settings.load_profile("any load")

NAMES = ("Anna", "Ben", "Carla", "Dora", "Emil", "Fred", "Greta", "Hugo")
COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey", "pink")
THINGS = ("apples", "boats", "cups", "doors", "eggs", "flags", "goats", "hats")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|start|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCAB = 300
LONGEST = (
    "kernels/test_hostile_bytes.py",  # builds with sanitizers
    "packaging/test_wheel.py",  # builds everything
    "unit/compress/test_team.py",
    "hostile/test_model_code.py",
    "cli/test_bench_recipes.py",
    "kernels/test_matmul.py",  # builds for other CPUs
    "parity/test_onnx_attention.py",
    "unit/benchmarks/test_measure.py",
    "unit/compress/test_device.py",
    "cli/test_strangers.py",
    "cli/test_pipeline.py",
    "parity/test_onnx_export.py",
    "kernels/test_fuzz.py",  # half a minute, after the build with sanitizers
    "cli/test_together.py",
    "unit/compress/test_train.py",
    "cli/test_python_page.py",
    "cli/test_damage.py",
    "parity/test_gguf_tokenizer.py",
    "cli/test_families.py",
    "cli/test_patterns.py",
)
"""Files that take longest, from about five minutes down to half of one: no process is left with one at the
end while the others have nothing to do."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""What libraries read when they are imported."""
RandomMask = Callable[[int, int, tuple[int, int] | None, int], NDArray[np.bool_]]
PairMask = Callable[[int, int, int], NDArray[np.bool_]]
"""(rows, columns, (N, M) or None, seed) → mask."""
SlidingMask = Callable[[int, int, int], NDArray[np.bool_]]
"""(rows, columns, seed) → mask of sliding windows."""

# A shell's background job starts with SIGINT ignored and would hand that down to every program under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of `LONGEST` first; the others stay in their order."""
    places = {str(Path(__file__).parent / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def made_up_text(sentences: int, seed: int) -> str:
    """Sentences whose words follow from the name; names mostly follow in order, so one can predict them."""
    rng = random.Random(seed)
    index = rng.randrange(len(NAMES))
    lines = []
    for _ in range(sentences):
        lines.append(f"{NAMES[index]} has {index + 2} {COLOURS[index]} {THINGS[(3 * index) % 8]}.")
        index = (index + 1) % len(NAMES) if rng.random() < 0.85 else rng.randrange(len(NAMES))
    return " ".join(lines)


class Warm:
    """Runs Python programs forked from a process that has imported torch; see `warm.py`."""

    DEVNULL, STDOUT = subprocess.DEVNULL, subprocess.STDOUT

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def run(
        self, command: list[str], *, stdout: BinaryIO, env: dict[str, str], **_: object
    ) -> SimpleNamespace:
        """As `subprocess.run` with both streams to a file."""
        assert command[:2] == [sys.executable, "-m"]
        if not hasattr(os, "fork"):
            done = subprocess.run(command, stdout=stdout, stderr=subprocess.STDOUT, env=env, check=False)
            return SimpleNamespace(returncode=done.returncode)
        return SimpleNamespace(returncode=self._forked(command[2:], env, stdout.name, 0))

    def team(self, count: int, argv: list[str], log: Path, env: dict[str, str]) -> int:
        """So many processes of a script, told of each other as by `torchrun`; the first exit code but 0."""
        log.touch()
        if hasattr(os, "fork"):
            return self._forked(argv, env, str(log), count)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        with log.open("ab") as handle:
            command = [*launcher, "--nproc-per-node", str(count), *argv]
            done = subprocess.run(command, stdout=handle, stderr=subprocess.STDOUT, env=env, check=False)
        return done.returncode

    def _forked(self, argv: list[str], env: dict[str, str], log: str, count: int) -> int:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("warm.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**env, **OFFLINE, "TMPDIR": tempfile.gettempdir()},
            )
        assert self.server.stdin is not None and self.server.stdout is not None
        job = {"argv": argv, "environment": env, "log": log, "count": count}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "tests/warm.py ended: run it by hand to see why"
        return int(answer)


@pytest.fixture(scope="session", autouse=True)
def warm() -> Iterator[Warm]:
    """Graphs are built in forked processes, which are the same programs but need not import torch first.

    `cold_graphs` has them built as in a real export, and a test compares the bytes.
    """
    from losa_deploy.exporters.onnx import graph

    found = Warm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "subprocess", found)
        yield found
    if found.server is not None:
        found.server.communicate()


@pytest.fixture
def cold_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of this test start a new interpreter for the graph."""
    from losa_deploy.exporters.onnx import graph

    monkeypatch.setattr(graph, "subprocess", subprocess)


@pytest.fixture(scope="session")
def pair_mask(random_mask: RandomMask) -> PairMask:
    """A function that makes masks of which the rows 2 i and 2 i + 1 are equal, of any density.

    The first two rows are empty, the last ones, or one, full.
    """

    def make(rows: int, columns: int, seed: int) -> NDArray[np.bool_]:
        return np.repeat(random_mask(-(-rows // 2), columns, None, seed), 2, axis=0)[:rows]

    return make


@pytest.fixture(scope="session")
def random_mask() -> RandomMask:
    """A function that makes masks: N of every M (of a short last group at most N), or rows of any density.

    Without a pattern the first row is empty, and the last one, which may be the same, full.
    """

    def make(rows: int, columns: int, pattern: tuple[int, int] | None, seed: int) -> NDArray[np.bool_]:
        rng = np.random.default_rng((rows, columns, seed))
        if pattern is None:
            mask = rng.random((rows, columns)) < rng.random((rows, 1))
            mask[0] = False
            mask[-1] = True
            return mask
        n, m = pattern
        order = rng.random((rows, -(-columns // m), m))
        order.reshape(rows, -1)[:, columns:] = 2.0  # what a short last group lacks comes last
        kept = order.argsort(axis=2).argsort(axis=2) < n
        return np.ascontiguousarray(kept.reshape(rows, -1)[:, :columns])

    return make


@pytest.fixture(scope="session")
def sliding_mask() -> SlidingMask:
    """A function that makes masks of sliding windows; of the first two rows all slots lie left, or right."""

    def make(rows: int, columns: int, seed: int) -> NDArray[np.bool_]:
        rng = np.random.default_rng((rows, columns, seed))
        mask = np.zeros((rows, columns), np.bool_)
        for row in range(rows):
            last = -1
            for start in range(-1, columns - 1, 2):
                first, most = max(start, last + 1), min(start + 3, columns - 1)
                last = int(rng.integers(first, most + 1)) if row > 1 else most if row else first
                mask[row, last] = True
        return mask

    return make


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills in the first worker of pytest-xdist that asks for it, and that all read."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / "once" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """About 3,000 tokens of the kind of text `tiny_llama` was trained on, which it has not seen."""
    return made_up_text(300, seed=1)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a byte-level BPE tokenizer (300 ids) with a chat template; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([made_up_text(200, seed=0)], trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=inner,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        chat_template=CHAT_TEMPLATE,
    )
    return once(tmp_path_factory, "tiny_tokenizer", lambda folder: tokenizer.save_pretrained(str(folder)))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> Path:
    """Hugging Face folder: 3 blocks, hidden 64, 4 heads on 2 key/value heads, tied head, f32, trained."""
    return once(tmp_path_factory, "tiny_llama", lambda folder: make_llama(tiny_tokenizer, folder))


def make_llama(tiny_tokenizer: Path, folder: Path) -> None:
    """Train the model of `tiny_llama` into a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tiny_tokenizer))
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        train(model, tokenizer.encode(made_up_text(2000, seed=0)), steps=160)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def train(model: object, ids: list[int], *, steps: int, batch: int = 16, length: int = 64) -> None:
    """Next-token training of a small causal LM on `ids`, in place, ended in evaluation mode."""
    import torch

    assert isinstance(model, torch.nn.Module)
    stream = torch.tensor(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (batch,))
        window = torch.stack([stream[s : s + length] for s in starts.tolist()])
        loss = model(input_ids=window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@pytest.fixture(scope="session")
def tiny_dense_onnx(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, warm: Warm) -> Path:
    """`tiny_llama` as onnxruntime-genai's own builder writes it: dense f32, no part of it ours."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", str(tiny_llama)]
        command += ["-o", str(folder), "-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]
        log = folder.with_suffix(".log")
        with log.open("ab") as handle:
            done = warm.run(command, stdout=handle, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, log.read_text()[-2000:]

    return once(tmp_path_factory, "tiny_dense_onnx", make)


PAGES = """
import json, re, sys

def pages():
    found, name = {"file": 0, "huge": 0}, ""
    for line in open("/proc/self/smaps"):
        key, _, rest = line.partition(":")
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            name = line.split(maxsplit=5)[5] if len(line.split()) > 5 else ""
        elif key == "AnonHugePages":
            found["huge"] += 1024 * int(rest.split()[0])
        elif key == "Rss" and sys.argv[2] in name:
            found["file"] += 1024 * int(rest.split()[0])
    return found
"""


@pytest.fixture(scope="session")
def memory_pages() -> str:
    """The start of a program: `pages()` is its memory in huge pages and in pages of the file argv[2]."""
    return PAGES
