"""What goes wrong, in the form in which OpenAI's clients expect to read it.

Knows no route and no engine.
"""

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
CLIENT_GONE = 499  # nobody reads it; this is how it is counted


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
      status: the HTTP status.
      message: what is wrong and what to do next; it is sent to the client.
      param: the field of the request that is wrong.
      code: a short name that programs can compare.
      headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


def error_object(error: ApiError) -> dict[str, object]:
    """The JSON of an error, in the body of an answer or in an event of a stream."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: ApiError) -> JSONResponse:
    """The answer that tells a client about an error."""
    return JSONResponse(error_object(error), status_code=error.status, headers=error.headers)


def engine_failed(error: BaseException) -> ApiError:
    """What a client is told of an error that is not its own; the text stays in the server's log."""
    name = type(error).__name__
    return ApiError(500, f"the server failed ({name}); its log says more", code="internal_error")


async def on_api_error(request: Request, error: Exception) -> Response:
    """Handles an `ApiError` that a route raised."""
    assert isinstance(error, ApiError)
    return error_response(error)


async def on_http_error(request: Request, error: Exception) -> Response:
    """Handles what starlette itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"there is nothing at {path}; this server has /v1/models, /v1/completions, "
        "/v1/chat/completions, /health and /metrics",
        405: f"{path} does not take {request.method}; see the Allow header",
    }.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def on_crash(request: Request, error: Exception) -> Response:
    """Handles everything else; starlette raises the error again for the log."""
    return error_response(engine_failed(error))


async def on_gone(request: Request, error: Exception) -> Response:
    """Handles a client that left while its request was read: nobody hears the answer."""
    assert isinstance(error, ClientDisconnect)
    return Response(status_code=CLIENT_GONE)
