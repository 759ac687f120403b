"""Plain ONNX Runtime: `model.onnx` with a key/value cache that stays inside the runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, MissingError
from losa_deploy.interfaces import Runtime

from ..facts import ModelFacts, check_step, check_steps, check_tokens, thread_count
from .cache import GrowingCache, SharedCache
from .graph import Graph, read_graph
from .library import LOADING_BYTES, check_target, operators_state, register

if TYPE_CHECKING:
    import onnxruntime as ort

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
FATAL_ONLY = 4
"""ONNX Runtime's errors are exceptions, whose text is ours to show; it would print them as well."""


class OrtRuntime(Runtime):
    """Opens exported ONNX folders in ONNX Runtime, with our operators for packed weights."""

    name = "ort"
    opens = f"a folder with {MODEL_FILE}"
    preference = 30

    def __init__(
        self, configure: Sequence[Callable[[ort.SessionOptions], None]] = (), *, native: bool = True
    ) -> None:
        """Each of `configure` sees the session options before a model is loaded, e.g. to set a profile.

        `native` false leaves the packed weights to the functions inside the model.
        """
        self._configure = tuple(configure)
        self._native = native

    def supports(self, folder: Path) -> bool:
        """True if there is a model.onnx."""
        return (folder / MODEL_FILE).is_file()

    def exact(self) -> OrtRuntime:
        """ONNX Runtime with the functions inside the model."""
        return StockOrtRuntime(self._configure) if self._native else self

    def facts(self) -> Mapping[str, str]:
        """Where the native operators are, or why ONNX Runtime cannot use them."""
        return {"onnxruntime_operators": operators_state()}

    def open(self, folder: Path, *, threads: int) -> OrtSession:
        """Load `model.onnx`; `threads` 0 means the physical cores.

        Raises `InputError` if the graph or its data file is missing, damaged or no decoder.
        """
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingError(
                "The ort runtime needs onnxruntime, which is not installed.",
                hint="Run `pip install onnxruntime`.",
            ) from None
        if not self.supports(folder):
            raise InputError(
                f"{folder} has no {MODEL_FILE}.", hint="Export one with `losa-deploy export --format onnx`."
            )
        facts = ModelFacts.read(folder)
        options = ort.SessionOptions()
        options.intra_op_num_threads = thread_count(threads)
        options.inter_op_num_threads = 1
        options.log_severity_level = FATAL_ONLY
        self.fallback = self._register(options)
        for configure in self._configure:
            configure(options)
        try:
            inner = ort.InferenceSession(
                str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except MemoryError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise _cannot_open(folder, error) from error
        return OrtSession(inner, read_graph(inner, facts, folder), facts)

    def _register(self, options: ort.SessionOptions) -> str:
        """Add the native operators; the reason if that fails, which costs speed and nothing else."""
        if self._native:
            check_target()
            try:
                register(options)
            except MissingError as error:
                return str(error)
        return ""


class StockOrtRuntime(OrtRuntime):
    """Opens the same folders as anyone without our library does."""

    name = "ort-stock"
    preference = -1
    loading_bytes = LOADING_BYTES

    def __init__(self, configure: Sequence[Callable[[ort.SessionOptions], None]] = ()) -> None:
        super().__init__(configure, native=False)

    def facts(self) -> Mapping[str, str]:
        """Nothing that the runtime with our operators does not say."""
        return {}


class OrtSession:
    """One sequence in an ONNX Runtime session."""

    def __init__(self, inner: ort.InferenceSession, graph: Graph, facts: ModelFacts) -> None:
        self._inner: ort.InferenceSession | None = inner
        self._graph = graph
        self._facts = facts
        self._cache: GrowingCache | SharedCache = (
            SharedCache(graph.cache, facts.context_length)
            if facts.shared_cache
            else GrowingCache(graph.cache)
        )
        self._binding = inner.io_binding()
        self._step_logits = np.zeros((1, 1, graph.vocab_size), graph.logits_dtype)
        self._ones = np.ones((1, 0), graph.id_dtype)
        self._length = 0
        self.vocab_size = graph.vocab_size
        self.context_length = facts.context_length

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache."""
        check_tokens(tokens, self.vocab_size, self.context_length)
        self._length = 0
        empty = self._graph.cache.zeros(0)
        feeds: dict[str, NDArray[np.generic]] = self._plain_inputs(tokens, 0)
        feeds.update(dict.fromkeys(self._graph.cache.past, empty))
        result = np.asarray(self._session.run(["logits"], feeds)[0][0], np.float32)
        if len(result) == len(tokens):
            return result
        return self._one_by_one(tokens)

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence; logits [vocab] after its last token."""
        check_tokens(tokens, self.vocab_size, self.context_length)
        self._length = 0
        self._cache.reset()
        return self._last(tokens)

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        check_step(token, self._length, self.vocab_size, self.context_length)
        return self._last((token,))

    def extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens in one run; logits [len(tokens), vocab] after each."""
        start = self._length
        check_steps(tokens, start, self.vocab_size, self.context_length)
        rows = np.array(self._run(tokens), np.float32)
        if len(rows) == len(tokens):
            return rows
        self.rewind(start)
        return np.stack([self.step(token) for token in tokens])

    def rewind(self, length: int) -> bool:
        """Forget what comes after the first `length` tokens."""
        self._cache.cut(length)
        self._length = length
        return True

    def close(self) -> None:
        """Free the session and its cache."""
        self._cache = GrowingCache(self._graph.cache)
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        self._inner = None

    @property
    def _session(self) -> ort.InferenceSession:
        if self._inner is None:
            raise RuntimeError("the session is closed")
        return self._inner

    def _one_by_one(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """All logits of a graph that returns only those of the last position."""
        rows = [self.prefill(tokens[:1]), *(self.step(t) for t in tokens[1:])]
        self._length = 0
        return np.stack(rows)

    def _plain_inputs(self, tokens: Sequence[int], past: int) -> dict[str, NDArray[np.generic]]:
        """input_ids [1, T], attention_mask [1, past + T], and position_ids where the graph has them."""
        total = past + len(tokens)
        if self._ones.shape[1] < total:
            self._ones = np.ones((1, 2 * total), self._graph.id_dtype)
        feeds: dict[str, NDArray[np.generic]] = {
            "input_ids": np.array([tokens], self._graph.id_dtype),
            "attention_mask": self._ones[:, :total],
        }
        if "position_ids" in self._graph.inputs:
            feeds["position_ids"] = np.arange(past, total, dtype=self._graph.id_dtype)[None]
        return feeds

    def _last(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; logits [vocab] after the last one."""
        return np.array(self._run(tokens)[-1], np.float32)

    def _run(self, tokens: Sequence[int]) -> NDArray[np.generic]:
        """Append tokens; the logits that the graph returns [tokens or 1, vocab], valid until the next run."""
        import onnxruntime as ort

        total = self._length + len(tokens)
        for name, array in self._plain_inputs(tokens, self._length).items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        # Fetching the outputs wraps each of them anew, which is felt in the step of a small model.
        stays = self._cache.in_place and len(tokens) == 1
        if stays:
            logits = ort.OrtValue.ortvalue_from_numpy(self._step_logits)
            self._binding.bind_ortvalue_output("logits", logits)
        else:  # bound anew, so that the runtime allocates it in the shape of this run
            self._binding.bind_output("logits", "cpu")
        self._cache.bind(self._binding, total)
        self._session.run_with_iobinding(self._binding)
        self._length = total
        if stays:
            step: NDArray[np.generic] = self._step_logits[0]
            return step
        outputs = self._binding.get_outputs()
        self._cache.take(outputs[1:])
        several: NDArray[np.generic] = outputs[0].numpy()[0]
        return several


def _cannot_open(folder: Path, error: Exception) -> InputError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if DATA_FILE in str(error) and not (folder / DATA_FILE).is_file():
        reason = f"{DATA_FILE} is missing"
    return InputError(
        f"ONNX Runtime cannot open {folder / MODEL_FILE}: {reason.rstrip('.')}.",
        hint="Copy the folder again with all its files, or export the model again.",
    )
