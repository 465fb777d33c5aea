"""Keeps the demo on this machine: requests that name addresses are refused, and pages may load nothing from elsewhere.

Gradio checks that a file that a request names was uploaded. It would also download one that is named by an address,
and its page may be told to load pictures from anywhere; both end here.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

__all__ = ["Guard", "addresses_in"]

_POLICY = "; ".join(
    [
        "default-src 'self'",
        # gradio's page compiles its templates
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' ws: wss:",
        "worker-src 'self' blob:",
        "frame-ancestors 'self'",
        "base-uri 'self'",
        "form-action 'self'",
    ]
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_MAX_BODY = 4 * 2**20
_SCHEMES = ("http:", "https:", "ftp:", "file:", "data:", "//")

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def addresses_in(data: Any) -> Iterator[str]:
    """Every `path` in JSON data that is an address and not a file on this machine."""
    if isinstance(data, dict):
        path = data.get("path")
        if isinstance(path, str) and path.strip().lower().startswith(_SCHEMES):
            yield path
        for value in data.values():
            yield from addresses_in(value)
    elif isinstance(data, list):
        for value in data:
            yield from addresses_in(value)


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        # gradio would send the browser on to any address behind `file=`
        target = scope["path"].partition("file=")[2]
        if target.lower().startswith(_SCHEMES):
            await _answer(headed, _address(target))
            return
        # an upload is a form and holds no paths; all else that is sent is JSON, no larger than settings are
        if scope["method"] != "POST" or _is_form(scope):
            await self._app(scope, receive, headed)
            return
        body, refused = await _read(receive)
        if refused is None:
            refused = _refusal(body)
        if refused is not None:
            await _answer(headed, refused)
            return
        sent = False

        async def again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, headed)


def _is_form(scope: Message) -> bool:
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    return any(kind.lower().startswith(b"multipart/form-data") for kind in kinds)


async def _read(receive: Receive) -> tuple[bytes, str | None]:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"", "the request broke off."
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MAX_BODY:
            return b"", f"the request is larger than {_MAX_BODY // 2**20} MiB. Upload files first, then name them."
        if not message.get("more_body", False):
            return b"".join(parts), None


def _refusal(body: bytes) -> str | None:
    try:
        data = json.loads(body) if body.strip() else None
    except (ValueError, RecursionError):
        # not JSON: gradio reads no paths from it either
        return None
    found = next(addresses_in(data), None)
    return None if found is None else _address(found)


def _address(found: str) -> str:
    return f"{found[:80]!r} is an address, and this demo fetches none. Upload the file itself."


async def _answer(send: Send, message: str) -> None:
    body = json.dumps({"detail": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
