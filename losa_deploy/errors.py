"""The closed set of errors a user can meet, each with its exit code.

Every error says what was found, what was expected and what to type next. Commands turn a
`LosaError` into one line on stderr (or one JSON document under `--json`) and its exit code.
"""

from __future__ import annotations

from collections.abc import Mapping

EXIT_OK = 0
EXIT_BUG = 1
EXIT_INTERRUPTED = 130


class LosaError(Exception):
    """Base class: `message` (found and expected), `hint` (what to type next), `details` (culprits)."""

    exit_code = EXIT_BUG
    code = "bug"

    def __init__(
        self, message: str, *, hint: str = "", details: Mapping[str, str | int | float] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def to_json(self) -> dict[str, object]:
        """The `losa.error/1` document."""
        return {
            "schema": "losa.error/1",
            "code": self.code,
            "exit_code": self.exit_code,
            "message": self.message,
            "hint": self.hint,
            "details": self.details,
        }


class UsageError(LosaError):
    """Wrong flag, wrong value, or an output that exists (exit code 2)."""

    exit_code = 2
    code = "usage"


class InputError(LosaError):
    """The model or file given cannot be used (exit code 3)."""

    exit_code = 3
    code = "input"


class ResourceError(LosaError):
    """Not enough memory or disk (exit code 4)."""

    exit_code = 4
    code = "resource"


class MissingError(LosaError):
    """An optional package, runtime or CPU feature is missing (exit code 5)."""

    exit_code = 5
    code = "missing"


class GateError(LosaError):
    """A check failed: proof, parity, quality or hash (exit code 6)."""

    exit_code = 6
    code = "gate"


class OfflineError(LosaError):
    """The network is needed but not available or not allowed (exit code 7)."""

    exit_code = 7
    code = "offline"
