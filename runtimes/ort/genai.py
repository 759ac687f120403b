"""onnxruntime-genai: the same folder through its `genai_config.json`, with its own cache handling."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.bindings.libraries import library_name
from losa_deploy.errors import InputError, MissingError
from losa_deploy.interfaces import Runtime

from ..facts import ModelFacts, check_step, check_tokens, thread_count
from .library import LOADING_BYTES, check_target, folder_with_library, refusal

if TYPE_CHECKING:
    import onnxruntime_genai as og

CONFIG_FILE = "genai_config.json"
MODEL_FILE = "model.onnx"
SMALLEST_BUFFER = 256
FATAL_ONLY = 4


class GenaiRuntime(Runtime):
    """Opens exported ONNX folders with onnxruntime-genai, with our operators for packed weights."""

    name = "genai"
    opens = f"a folder with {CONFIG_FILE} and {MODEL_FILE}"
    preference = 20
    loading_bytes = LOADING_BYTES

    def __init__(self, *, native: bool = True) -> None:
        """`native` false leaves the packed weights to the functions inside the model."""
        self._native = native

    def supports(self, folder: Path) -> bool:
        """True if there are a genai_config.json and a model.onnx."""
        return (folder / CONFIG_FILE).is_file() and (folder / MODEL_FILE).is_file()

    def exact(self) -> GenaiRuntime:
        """onnxruntime-genai with the functions inside the model."""
        return GenaiRuntime(native=False) if self._native else self

    def open(self, folder: Path, *, threads: int) -> GenaiSession:
        """Load the model; `threads` 0 means the physical cores.

        Raises `InputError` if a file is missing or onnxruntime-genai refuses the folder.
        """
        try:
            import onnxruntime_genai  # noqa: F401
        except ImportError:
            raise MissingError(
                "The genai runtime needs onnxruntime-genai, which is not installed.",
                hint="Run `pip install onnxruntime-genai`, or use --runtime ort.",
            ) from None
        for name in (MODEL_FILE, CONFIG_FILE):
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder} has no {name}.", hint="Export one with `losa-deploy export --format onnx`."
                )
        facts = ModelFacts.read(folder)
        options = {
            "intra_op_num_threads": thread_count(threads),
            "inter_op_num_threads": 1,
            "log_severity_level": FATAL_ONLY,
        }
        try:
            model = self._load(folder, options)
        except MemoryError:
            raise
        except Exception as error:  # the bindings raise RuntimeError and bare exceptions alike
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise InputError(
                f"onnxruntime-genai cannot open {folder}: {reason}.",
                hint="Copy the folder again with all its files, or export the model again.",
            ) from error
        return GenaiSession(model, facts)

    def _load(self, folder: Path, options: Mapping[str, int]) -> og.Model:
        """The model with the native operators, or without and the reason in `fallback`."""
        if self._native:
            check_target()
        self.fallback = refusal() if self._native else ""
        with ExitStack() as stack:
            if not self._native or self.fallback:
                return _load_model(folder, options)
            try:
                folder = stack.enter_context(folder_with_library(folder))
            except OSError as error:
                self.fallback = f"The native operators cannot be put beside the model: {error}."
                return _load_model(folder, options)
            return _load_model(folder, {**options, "custom_ops_library": library_name()})


def _load_model(folder: Path, options: Mapping[str, int | str]) -> og.Model:
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


class GenaiSession:
    """One sequence in an onnxruntime-genai model."""

    def __init__(self, model: og.Model, facts: ModelFacts) -> None:
        self._model: og.Model | None = model
        self._generator: og.Generator | None = None
        self._tokens: list[int] = []
        self._capacity = 0
        self.vocab_size = facts.vocab_size
        self.context_length = facts.context_length

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache."""
        check_tokens(tokens, self.vocab_size, self.context_length)
        generator = self._start(tokens)
        result = np.array(generator.get_output("logits")[0], np.float32)
        self._tokens = []
        if len(result) == len(tokens):
            return result
        rows = [self.prefill(tokens[:1]), *(self.step(t) for t in tokens[1:])]
        self._tokens = []
        return np.stack(rows)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence; logits [vocab] after its last token."""
        check_tokens(tokens, self.vocab_size, self.context_length)
        return self._last(self._start(tokens))

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        check_step(token, len(self._tokens), self.vocab_size, self.context_length)
        if self._generator is None or len(self._tokens) >= self._capacity:
            return self._last(self._start((*self._tokens, token)))
        self._generator.append_tokens(np.array([token], np.int32))
        self._tokens.append(token)
        return self._last(self._generator)

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Up to `max_tokens` tokens of onnxruntime-genai's own greedy loop; an end token is the last one."""
        check_tokens(prompt, self.vocab_size, self.context_length)
        generator = self._start(prompt, len(prompt) + max_tokens)
        self._tokens = []
        for _ in range(max_tokens):
            if generator.is_done():
                return
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def close(self) -> None:
        """Free the generator and the model."""
        self._generator, self._model, self._tokens = None, None, []

    def _start(self, tokens: Sequence[int], length: int = 0) -> og.Generator:
        """A generator holding `tokens`; its cache has a fixed size, so a longer sequence gets a new one."""
        import onnxruntime_genai as og

        if self._model is None:
            raise RuntimeError("the session is closed")
        needed = max(len(tokens) + 1, length)
        if self._generator is None or needed > self._capacity:
            self._capacity = self._room_for(needed)
            params = og.GeneratorParams(self._model)
            params.set_search_options(max_length=self._capacity, do_sample=False)
            self._generator = None
            self._generator = og.Generator(self._model, params)
        else:
            self._generator.rewind_to(0)
        self._generator.append_tokens(np.array(tokens, np.int32))
        self._tokens = list(tokens)
        return self._generator

    def _room_for(self, length: int) -> int:
        room = max(SMALLEST_BUFFER, 1 << (length - 1).bit_length())
        return min(room, self.context_length) if self.context_length else room

    @staticmethod
    def _last(generator: og.Generator) -> NDArray[np.float32]:
        logits = generator.get_logits()
        return np.array(logits.reshape(-1, logits.shape[-1])[-1], np.float32)
