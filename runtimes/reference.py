"""Torch and transformers in f32 on an ordinary Hugging Face folder, as one session among others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, MissingError
from losa_deploy.interfaces import Runtime

from .facts import ModelFacts, check_step, check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


class ReferenceRuntime(Runtime):
    """Opens Hugging Face folders with torch; slow and exact."""

    name = "reference"
    opens = "a folder with config.json and safetensors weights"

    def supports(self, folder: Path) -> bool:
        """True for a folder with config.json and safetensors weights."""
        return (folder / "config.json").is_file() and any((folder / n).is_file() for n in WEIGHT_FILES)

    def open(self, folder: Path, *, threads: int) -> ReferenceSession:
        """Load all weights as f32; raises `InputError` if transformers cannot read the folder."""
        if not self.supports(folder):
            raise InputError(
                f"{folder} is not a Hugging Face folder with safetensors weights.",
                hint="Give the source model or the merged folder.",
            )
        return ReferenceSession(_load(folder), ModelFacts.read(folder), threads)


class ReferenceSession:
    """One sequence in a torch model, with its key/value cache."""

    def __init__(self, model: PreTrainedModel, facts: ModelFacts, threads: int) -> None:
        self._model: PreTrainedModel | None = model
        self._threads = threads
        self._cache: Cache | None = None
        self._length = 0
        self.vocab_size: int = facts.vocab_size
        self.context_length: int = facts.context_length

    @property
    def model(self) -> PreTrainedModel:
        """The torch module, for checks that look inside it."""
        if self._model is None:
            raise RuntimeError("the session is closed")
        return self._model

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence, without a cache."""
        check_tokens(tokens, self.vocab_size, self.context_length)
        self._reset()
        return self._run(tokens, None)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence; logits [vocab] after its last token."""
        from transformers import DynamicCache

        check_tokens(tokens, self.vocab_size, self.context_length)
        self._reset()
        cache = DynamicCache(config=self.model.config)
        logits = self._run(tokens, cache)
        self._cache, self._length = cache, len(tokens)
        last: NDArray[np.float32] = logits[-1]
        return last

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        check_step(token, self._length, self.vocab_size, self.context_length)
        logits = self._run((token,), self._cache)
        self._length += 1
        last: NDArray[np.float32] = logits[-1]
        return last

    def close(self) -> None:
        """Drop the model and the cache."""
        self._reset()
        self._model = None

    def _reset(self) -> None:
        self._cache, self._length = None, 0

    def _run(self, tokens: Sequence[int], cache: Cache | None) -> NDArray[np.float32]:
        import torch

        from losa_deploy.pretrained import cache_argument
        from losa_deploy.verify.oracle import torch_threads

        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        argument = {cache_argument(self.model): cache}
        with torch.inference_mode(), torch_threads(self._threads):
            output = self.model(input_ids=ids, use_cache=cache is not None, **argument)
        logits: NDArray[np.float32] = output.logits[0].float().numpy()
        return logits


def _load(folder: Path) -> PreTrainedModel:
    """The model in f32 and evaluation mode, without progress bars or code from the folder."""
    try:
        from losa_deploy.pretrained import load_model

        with _quiet():
            return load_model(folder)
    except ImportError as error:
        raise MissingError(
            f"The reference runtime needs {error.name}, which is not installed.",
            hint="Run `pip install losa-deploy` again.",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bar and warnings off stderr, which carries our own progress."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
