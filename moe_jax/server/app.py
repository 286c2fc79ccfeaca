"""The server as an ASGI application: which path leads where."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from moe_jax.server.access import CountAnswers, RequireKey
from moe_jax.server.chat import chat
from moe_jax.server.completions import completions
from moe_jax.server.errors import ApiError, on_api_error, on_crash, on_gone, on_http_error
from moe_jax.server.face import ServedEngine
from moe_jax.server.limits import Limits
from moe_jax.server.metrics import CONTENT_TYPE
from moe_jax.server.service import Service


def make_app(
    engine: ServedEngine, *, model: str, api_key: str | None = None, limits: Limits | None = None
) -> Starlette:
    """The application that serves one engine; `GracefulServer` runs it.

    Args:
      engine: what generates.
      model: the name by which clients ask for it.
      api_key: what clients must send as a bearer token; None: nothing.
      limits: what clients may ask for.

    Raises ValueError for a model without a name, and for an empty key or one that no header holds.
    """
    if not model:
        raise ValueError("the model needs a name that clients ask for, got ''")
    if api_key is not None and (not api_key.strip() or not api_key.isprintable()):
        raise ValueError(
            "the API key must be printable and not empty; give another, or none to serve all"
        )
    service = Service(engine, model, limits or Limits())
    routes = [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", one_model, methods=["GET"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
    paths = frozenset(route.path for route in routes)
    middleware = [Middleware(CountAnswers, metrics=service.metrics, routes=paths)]
    if api_key is not None:
        middleware.append(Middleware(RequireKey, key=api_key))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_gone,
            Exception: on_crash,
        },
    )
    app.router.redirect_slashes = False  # a redirected POST loses its body
    app.state.service = service
    return app


async def models(request: Request) -> Response:
    """The one model that is served."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def one_model(request: Request) -> Response:
    """The same, by name."""
    service: Service = request.app.state.service
    service.check_model(request.path_params["name"])
    return JSONResponse(_model(service))


async def health(request: Request) -> Response:
    """200 if requests are welcome; 503 while shutting down, and after an error of the engine.

    An error is forgotten when a later request succeeds.
    """
    service: Service = request.app.state.service
    if service.gate.closed:
        return JSONResponse({"status": "shutting down"}, status_code=503)
    if service.failure is not None:
        return JSONResponse({"status": "the engine failed"}, status_code=503)
    return JSONResponse({"status": "ready"})


async def metrics(request: Request) -> Response:
    """Everything counted, as Prometheus text."""
    service: Service = request.app.state.service
    text = service.metrics.text(service.engine.load_now)
    return Response(text, headers={"content-type": CONTENT_TYPE})


def _model(service: Service) -> dict[str, object]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "moe_jax",
    }
