"""Refusals as OpenAI's clients read them: a status code and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

INVALID = "invalid_request_error"
SERVER = "server_error"
INTERNAL_MESSAGE = "The server could not finish this request; the reason is in its log."


class ApiError(Exception):
    """A refusal that is meant for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, object]:
        """The JSON document of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def internal_error() -> ApiError:
    """What a client learns of a failure inside the server: that there was one."""
    return ApiError(500, INTERNAL_MESSAGE, kind=SERVER, code="internal_error")


def validation_error(errors: Sequence[Mapping[str, object]]) -> ApiError:
    """The first of pydantic's complaints about a request body, with the field it is about."""
    first = errors[0] if errors else {}
    place = first.get("loc")
    field = _path(place if isinstance(place, tuple) else ())
    kind, words = str(first.get("type", "")), str(first.get("msg", "it is malformed"))
    if kind == "json_invalid" or not field:
        return ApiError(400, f"The body is not the JSON object expected here: {words}.", code="invalid_body")
    if kind == "extra_forbidden":
        return ApiError(
            400,
            f"The field {field!r} is not known to this server.",
            param=field,
            code="unknown_parameter",
        )
    if kind == "missing":
        return ApiError(
            400, f"The field {field!r} is required.", param=field, code="missing_required_parameter"
        )
    code = "unsupported_parameter" if kind == "unsupported" else "invalid_value"
    return ApiError(400, f"The field {field!r} cannot be used: {words.rstrip('.')}.", param=field, code=code)


def _path(place: tuple[object, ...]) -> str:
    """`("body", "messages", 0, "role")` → `messages[0].role`."""
    text = ""
    for part in place[1:] if place[:1] == ("body",) else place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
