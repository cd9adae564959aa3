"""One file a model: its address, what it takes, and which deployments it asks. Each has a `router`; the gateway takes all that lie here."""

from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from serve.backends import Backends
from serve.settings import GatewaySettings

REF = "#/components/schemas/{model}"


def backends(request: Request) -> Backends:
    return request.app.state.backends


def limits(request: Request) -> GatewaySettings:
    return request.app.state.limits


def answer(made: BaseModel) -> Response:
    """As JSON, once: FastAPI would check and copy what is a checked record already, pictures and all."""
    return Response(made.model_dump_json(), media_type="application/json")


def takes(content: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a body that a route reads by itself, after the key was seen. content: by media type."""
    return {"requestBody": {"required": True, "content": content}}


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template=REF)
