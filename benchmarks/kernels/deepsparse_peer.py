"""DeepSparse on the same machine, through a Python environment of its own.

It needs NumPy 1 and Python 3.11 at most:
`python3.11 -m venv DIR && DIR/bin/pip install deepsparse==1.8.0`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from losa_deploy.errors import MissingError

SCRIPT = Path(__file__).with_name("deepsparse_layer.py")
TIMEOUT = 600.0
PROCESSES = 3
"""Fresh processes per case. Beside other load some of them ran five times as slow from start to end."""


def measure_deepsparse(
    python: Path,
    shape: tuple[int, int],
    sparsities: Sequence[float],
    tokens: Sequence[int],
    threads: Sequence[int],
) -> list[dict[str, object]]:
    """One record per sparsity, number of tokens and of threads; f32, unstructured zeros.

    A record is that of the fastest of `PROCESSES` processes; `runs` holds the medians of all.
    Raises `MissingError` with the last line it printed if that Python cannot run DeepSparse.
    """
    records: list[dict[str, object]] = []
    for sparsity in sparsities:
        for count in tokens:
            for number in threads:
                command = [
                    str(python),
                    "-I",
                    str(SCRIPT),
                    "--rows",
                    str(shape[0]),
                    "--columns",
                    str(shape[1]),
                ]
                command += ["--sparsity", str(sparsity), "--batch", str(count), "--threads", str(number)]
                records.append(_fastest([_run(python, command) for _ in range(PROCESSES)]))
    return records


def _fastest(runs: Sequence[dict[str, object]]) -> dict[str, object]:
    rates = [float(str(run["weights_per_second"])) for run in runs]
    return {**runs[rates.index(max(rates))], "runs": rates}


def _run(python: Path, command: Sequence[str]) -> dict[str, object]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failure(python, str(error)) from None
    if done.returncode != 0:
        raise _failure(python, (done.stderr.strip().splitlines() or ["no message"])[-1])
    record = json.loads(done.stdout.strip().splitlines()[-1])
    return {str(key): value for key, value in record.items()}


def _failure(python: Path, reason: str) -> MissingError:
    return MissingError(
        f"DeepSparse cannot be measured with {python}: {reason.rstrip('.')}.",
        hint="Make an environment: `python3.11 -m venv DIR`, `DIR/bin/pip install deepsparse==1.8.0`, "
        "and give DIR/bin/python.",
    )
