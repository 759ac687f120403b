"""A model in OpenVINO, in a process of its own.

`python -m losa_deploy.benchmarks.openvino.worker PACKAGE FOLDER THREADS` serves it as
`process_worker.py` says.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from losa_deploy.errors import InputError, MissingError

from ..process_worker import answer
from .package import DISTRIBUTION, MODEL, TESTED

if TYPE_CHECKING:
    import openvino


ROWS = "rows"
"""Input of our own: rows whose logits are wanted."""


class OpenvinoModel:
    """A model with one sequence; its cache is inside, and all but the threads is as by default."""

    context_length = 0
    """It grows with the sequence."""

    def __init__(self, package: Path, folder: Path, threads: int) -> None:
        _load(package)
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads} if threads else {}
        core = openvino.Core()
        try:
            model = core.read_model(str(folder / MODEL))
            _let_choose_rows(model)
            compiled = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
            raise InputError(f"OpenVINO cannot open {folder}: {reason}", hint="Leave it out.") from None
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.names}
        self._length = 0
        self.vocab_size = int(compiled.output("logits").partial_shape[2].get_length())

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(tokens), vocab] of one sequence from an empty cache."""
        self._start()
        return self._run(tokens, range(len(tokens)))

    def prefill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Start a new sequence; logits [vocab] after its last token."""
        self._start()
        return self._last(tokens)

    def step(self, token: int) -> NDArray[np.float32]:
        """Append one token; logits [vocab] after it."""
        return self._last((token,))

    def close(self) -> None:
        """Nothing: the process ends with it."""

    def _last(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; logits [vocab] after the last one."""
        logits: NDArray[np.float32] = self._run(tokens, (len(tokens) - 1,))[0]
        return logits

    def _start(self) -> None:
        self._request.reset_state()
        self._length = 0

    def _run(self, tokens: Sequence[int], rows: Sequence[int]) -> NDArray[np.float32]:
        """Append tokens; logits [len(rows), vocab] of these rows of them."""
        total = self._length + len(tokens)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
            ROWS: np.array(rows, np.int64),
        }
        self._request.infer({name: feeds[name] for name in feeds if name in self._inputs})
        self._length = total
        return np.array(self._request.get_tensor("logits").data[0], np.float32)


def _let_choose_rows(model: openvino.Model) -> None:
    """The head gets the rows of the new input `ROWS` only, as OpenVINO GenAI gives it the last one only."""
    from openvino import opset13 as operators

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    rows = operators.parameter([-1], np.int64, name=ROWS)
    rows.output(0).set_names({ROWS})
    chosen = operators.gather(node.input_value(0), rows, np.int64(1))
    node.input(0).replace_source_output(chosen.output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def _load(package: Path) -> None:
    """Let OpenVINO be imported from the package; `MissingError` if it cannot be loaded."""
    sys.path.insert(0, str(package))
    try:
        importlib.import_module("openvino")
    except (ImportError, OSError) as error:
        raise MissingError(
            f"{DISTRIBUTION} in {package} cannot be loaded: {error}.",
            hint=f"Install the tested version, {DISTRIBUTION}=={TESTED}.",
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """The command line above; a `LosaError` is JSON on stderr, and its exit code."""
    parser = argparse.ArgumentParser(prog="losa_deploy.benchmarks.openvino.worker", description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--probe", type=int, nargs=2, metavar=("PROMPT", "DECODE"))
    options = parser.parse_args(arguments)
    return answer(lambda: OpenvinoModel(options.package, options.model, options.threads), options.probe)


if __name__ == "__main__":
    sys.exit(main())
