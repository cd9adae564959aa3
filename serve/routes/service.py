"""What is loaded, and how the service is."""

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from serve.messages import Loaded, Models
from serve.problems import Problem, documented
from serve.routes import answer, backends
from serve.security import admitted
from serve.worker import together

router = APIRouter(tags=["service"])


class Health(BaseModel):
    status: str = Field(examples=["ok"])


@router.get(
    "/v1/models",
    summary="What is loaded: on which data it was trained, and how well it does",
    response_model=Models,
    responses=documented(401, 429, 500, 503, 504),
    dependencies=[Depends(admitted)],
)
async def models(request: Request) -> Response:
    asked = backends(request)
    said = await together(asked.ask(name, "about") for name in asked)
    return answer(Models(models=[about for about in said if isinstance(about, Loaded)]))


@router.get("/healthz", summary="Whether the gateway is up", response_model=Health, responses=documented(500))
async def healthz() -> Response:
    """Needs no key."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz", summary="Whether all models answer", response_model=Health, responses=documented(500, 503, 504))
async def readyz(request: Request) -> Response:
    """Needs no key. A service that is merely full is ready: it turns away what is too much for it."""
    if not await request.app.state.ready.now():
        raise Problem(503, "not_ready", "a model does not answer yet", retry_after=1)
    return JSONResponse({"status": "ready"})


@router.get(
    "/metrics",
    summary="Counts and times, as Prometheus reads them",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}} | documented(500),
)
async def metrics(request: Request) -> Response:
    """Needs no key, as what collects it seldom has one: it holds addresses of this page, statuses and times, and nothing that was sent.

    Of one replica of the gateway; where there are several, each has its own counts.
    """
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)
