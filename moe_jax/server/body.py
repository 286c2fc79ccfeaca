"""Reads the JSON object in a request's body, within limits of size and time."""

import asyncio
import json

from starlette.requests import Request

from moe_jax.server.errors import ApiError
from moe_jax.server.limits import Limits


async def read_json(request: Request, limits: Limits) -> dict[str, object]:
    """The JSON object that a client sent.

    Raises ApiError: 415 if it is not declared as JSON, 413 if it is too big, 408 if it comes too
    slowly, 400 if it is no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Web pages may send other kinds to any address without asking first.
    if kind != "application/json":
        raise ApiError(415, f"send JSON with 'Content-Type: application/json', got {kind!r}")
    body = await _read(request, limits)
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got a {type(value).__name__}")
    return value


async def _read(request: Request, limits: Limits) -> bytes:
    """The whole body. What is too big is read on for a while, but not kept.

    An answer that is sent while the client still writes is lost when the connection closes.
    """
    announced = request.headers.get("content-length", "")
    if (
        announced.isdecimal()
        and int(announced) > limits.body_bytes
        and request.headers.get("expect", "").lower() == "100-continue"
    ):
        raise _too_big(limits)  # this client waits to hear it before it sends anything
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body_bytes:
                    parts.append(part)
                elif size > 8 * limits.body_bytes:
                    break
                else:
                    parts.clear()
    except TimeoutError as error:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.body_seconds:g} seconds; send it faster, or "
            "raise the server's limit",
            headers={"connection": "close"},
        ) from error
    if size > limits.body_bytes:
        raise _too_big(limits)
    return b"".join(parts)


def _too_big(limits: Limits) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limits.body_bytes} bytes; send fewer prompts at a time, or "
        "raise the server's limit",
        headers={"connection": "close"},
    )


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
