"""Every error that a client sees, in OpenAI's form: `{"error": {message, type, param, code}}`.

400 says what is wrong with the request and in which field, 401 and 404 what is not known, 408 and
413 which limit was passed, 503 that the server is full or stopping and when to come again. 500 is
a fault of the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

RETRY_SECONDS = 2
"""Clients come again after so long when the server is full."""

TYPES = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}


class ApiFault(HTTPException):
    """An answer other than the one that was asked for.

    Args:
        status: HTTP's.
        message: What is wrong and what to do, for a person.
        param: The field that is at fault.
        code: What is wrong, for a program.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        headers = {503: {"Retry-After": str(RETRY_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
        super().__init__(status, message, headers.get(status))
        kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        # What a client sent may hold half a surrogate pair, which no answer can.
        message = message.encode("utf-8", "backslashreplace").decode()
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    def response(self) -> JSONResponse:
        """As it is sent."""
        return JSONResponse(self.body, self.status_code, self.headers)


def fault_of_validation(errors: Sequence[dict[str, Any]], body: object) -> ApiFault:
    """What is wrong with a body, from pydantic's list of it: its first entry.

    Args:
        errors: As pydantic's `errors()` gives them, each `loc` within the body.
        body: What was sent, to tell fields from pydantic's names of alternatives.
    """
    # Of a union the alternative that came furthest is most likely the one that was meant.
    error = max(errors, key=lambda error: len(_path(error, body)))
    param = _path(error, body)
    if error["type"] == "extra_forbidden":
        return ApiFault(
            400,
            f"{param} is not supported by this server. Leave it out.",
            param=param,
            code="unsupported_parameter",
        )
    if error["type"] == "missing":
        return ApiFault(400, f"{param} is missing.", param=param, code="missing_required_parameter")
    reason = error["msg"].removeprefix("Value error, ")
    where = f"{param}: " if param else ""
    return ApiFault(400, f"{where}{reason}.", param=param or None, code="invalid_value")


def _path(error: dict[str, Any], body: object) -> str:
    """`messages[0].content` for a place within the body."""
    path = ""
    here: Any = body
    for number, part in enumerate(error["loc"], start=1):
        is_last = number == len(error["loc"])
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            path, here = f"{path}[{part}]", here[part]
        elif isinstance(here, dict) and isinstance(part, str):
            if part in here:
                here = here[part]
            elif not (is_last and error["type"] == "missing"):
                continue
            path = f"{path}.{part}" if path else part
    return path
