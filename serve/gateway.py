"""The HTTP interface: a FastAPI app over the deployments' handles.

Whatever lies in serve/routes is taken in: a new model brings a file there. Refusals are problem details (serve/problems.py), a request has
an id, a deadline, and a line in the log (serve/telemetry.py), and without a key nothing of its body is read (serve/security.py).
"""

import copy
import importlib
import pkgutil
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

import serve.routes
from contracts.pages import NOT_FOR_DIAGNOSIS
from serve import problems
from serve.backends import Backends, Ready
from serve.messages import ProblemDetails
from serve.routes import schema_of
from serve.security import Gate, Keys
from serve.settings import GatewaySettings
from serve.telemetry import Metrics, Telemetry, log_with_serve

__all__ = ["Backends", "create"]

VERSION = "1"


def create(backends: Backends, limits: GatewaySettings) -> FastAPI:
    """The gateway. limits.keys: the file of keys, as the process finds it; while there is none, nobody is let in."""
    about = f"{NOT_FOR_DIAGNOSIS} Chest X-rays, read by models of cxray."
    # No pages of FastAPI's: they take their scripts from a public network, and run them beside whoever types a key there.
    app = FastAPI(title="cxray", version=VERSION, description=about, redirect_slashes=False, docs_url=None, redoc_url=None)
    log_with_serve()
    app.state.backends, app.state.limits, app.state.metrics = backends, limits, Metrics()
    app.state.gate, app.state.ready = Gate(Keys(Path(limits.keys)), limits.rate_per_minute, limits.ongoing_per_key), Ready(backends)
    app.add_middleware(Telemetry, metrics=app.state.metrics, deadline_s=limits.deadline_s, body_s=limits.body_s)
    problems.install(app)
    for module in sorted(m.name for m in pkgutil.iter_modules(serve.routes.__path__)):
        app.include_router(importlib.import_module(f"serve.routes.{module}").router)
    app.openapi = lambda: _openapi(app)
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = copy.deepcopy(get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes))
        shared = made.setdefault("components", {}).setdefault("schemas", {})
        shared["ProblemDetails"] = schema_of(ProblemDetails)
        _hoist(made["paths"], shared)
        app.openapi_schema = made
    return app.openapi_schema


def _hoist(node: Any, shared: dict[str, Any]) -> None:
    """Schemas that bodies brought along move to where their references point."""
    if isinstance(node, dict):
        shared |= node.pop("$defs", {})
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _hoist(inner, shared)
