"""Studies that the service was told to show, to try it on."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from serve.messages import Example, Examples
from serve.problems import Problem, documented
from serve.routes import answer, backends
from serve.security import admitted

router = APIRouter(tags=["examples"])


@router.get(
    "/v1/examples",
    summary="Which studies there are to try",
    response_model=Examples,
    responses=documented(401, 404, 429, 500, 503, 504),
    dependencies=[Depends(admitted)],
)
async def examples(request: Request) -> Response:
    return answer(Examples(examples=await backends(request).ask("examples", "list")))


@router.get(
    "/v1/examples/{id}",
    summary="One of them, with its images, chart and report",
    response_model=Example,
    responses=documented(401, 404, 422, 429, 500, 503, 504),
    dependencies=[Depends(admitted)],
)
async def example(request: Request, id: Annotated[str, Path(min_length=1, max_length=64)]) -> Response:
    found = await backends(request).ask("examples", "one", id)
    if found is None:
        raise Problem(404, "no_such_example", "no example has this id; `/v1/examples` lists those that are there")
    return answer(found)
