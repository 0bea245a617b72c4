"""What every request passes before anything is done for it, and what is written of it after.

A request gets an id, which its answer and its line in the log carry. It is turned away while the
server drains or is full, without a key where keys are asked for, with a body that is too large or
does not come. What goes wrong with it later is answered in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.serving.server.faults import ApiFault
from moesaic.serving.server.metrics import Metrics

OPEN_PATHS = ("/", "/page.js", "/health", "/metrics")
"""Answered without a key, and while the server drains."""

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class RequestLog:
    """One line for each request, for people or for programs."""

    def __init__(self, form: Literal["text", "json", "none"], stream: TextIO | None = None) -> None:
        self._form = form
        self._stream = stream or sys.stderr

    def write(self, event: str, **facts: Any) -> None:
        """Write what happened; facts that are None are left out."""
        if self._form == "none":
            return
        facts = {name: value for name, value in facts.items() if value is not None}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._form == "json":
            line = json.dumps({"time": now, "event": event, **facts}, default=str)
        else:
            words = (f"{name}={_short(value)}" for name, value in facts.items())
            line = f"{now} {event} {' '.join(words)}"
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads the log any more; answers go on
            self._form = "none"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    # One request is one line, and what a client sends cannot make it look like two.
    return text if text.isprintable() and " " not in text else json.dumps(text)


class Gate:
    """ASGI middleware around the whole application.

    Args:
        app: The application.
        keys: One of these must be given as a bearer token; none lets everyone in.
        max_body_bytes: Longest body.
        body_seconds: Longest that a body may take to come.
        max_requests: Requests at the same time, beyond which more are turned away.
        log: Where requests are written.
        metrics: Where they are counted.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        max_body_bytes: int,
        body_seconds: float,
        max_requests: int,
        log: RequestLog,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._max_body_bytes, self._body_seconds = max_body_bytes, body_seconds
        self._max_requests = max_requests
        self._log, self._metrics = log, metrics
        self.in_flight = 0
        """Requests that are being answered, those for open paths aside."""
        self.is_draining = False
        """Whether new requests are turned away because the server is to end."""
        self.stop_requests = 0
        """How often it was asked to end. The first time it drains; the second it does not wait."""

    def ask_to_stop(self) -> None:
        """Take no more requests, and end once those that were begun have ended."""
        self.stop_requests += 1
        self.is_draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        facts: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, facts=facts, began=began)
        status: int | None = None

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                also = [(b"x-request-id", request_id.encode())]
                if self.is_draining:
                    also.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", ()), *also]}
            await send(message)

        is_open = scope["path"] in OPEN_PATHS
        self.in_flight += not is_open
        try:
            if not is_open:
                self._turn_away(headers)
            await self._app(scope, self._limited(receive, headers), send_marked)
        except ApiFault as fault:
            facts["fault"] = fault.body["error"]["message"]
            await fault.response()(scope, receive, send_marked)
        except Exception:
            traceback.print_exc(file=sys.stderr)
            facts["fault"] = "a fault of the server"
            if status is None:
                own = ApiFault(500, "The server met a fault of its own. Its log has more.")
                await own.response()(scope, receive, send_marked)
        finally:
            self.in_flight -= not is_open
            self._write(scope, status, time.perf_counter() - began, facts)

    def _turn_away(self, headers: dict[bytes, bytes]) -> None:
        if self.is_draining:
            raise ApiFault(503, "The server is stopping. Try again later.", code="draining")
        if self.in_flight > self._max_requests:
            raise ApiFault(
                503,
                f"{self._max_requests} requests are being answered. Try again later.",
                code="overloaded",
            )
        if self._keys:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            # All are compared, each in constant time: how long it takes tells nothing of a key.
            matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
            if scheme.lower() != b"bearer" or not any(matches):
                raise ApiFault(
                    401,
                    "No valid API key was given. Send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiFault:
        return ApiFault(
            413, f"The body is larger than {self._max_body_bytes:,} bytes.", code="body_too_large"
        )

    def _limited(
        self, receive: Receive, headers: dict[bytes, bytes]
    ) -> Callable[[], Awaitable[Message]]:
        """`receive` for a body that has a largest size and a last moment."""
        left = self._max_body_bytes
        has_body = b"content-length" in headers or b"transfer-encoding" in headers
        end = asyncio.get_running_loop().time() + self._body_seconds if has_body else None

        async def limited() -> Message:
            nonlocal left, end
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                raise ApiFault(
                    408, f"The body did not come within {self._body_seconds:g} s."
                ) from None
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    raise self._too_large()
                if not message.get("more_body"):
                    end = None  # from here on it is the end of the connection that comes
            return message

        return limited

    def _write(
        self, scope: Scope, status: int | None, seconds: float, facts: dict[str, Any]
    ) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "other"
        self._metrics.requests.labels(path, str(status or "gone")).inc()
        if scope["path"] in OPEN_PATHS and status == 200:
            return
        client = scope.get("client")
        self._log.write(
            "request",
            id=scope["state"]["request_id"],
            client=client[0] if client else None,
            method=scope["method"],
            path=scope["path"],
            status=status,
            seconds=round(seconds, 4),
            **facts,
        )
