"""An OpenAI-compatible HTTP server around one engine; needs the extra `serve`."""

from moe_jax.server.app import make_app as make_app
from moe_jax.server.limits import Limits as Limits
from moe_jax.server.run import GracefulServer as GracefulServer
from moe_jax.server.run import make_server as make_server
