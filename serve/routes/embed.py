"""Texts and images -> the encoders' vectors, of length 1."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from contracts.errors import RowError
from serve import uploads
from serve.messages import Embedded, EmbedRequest
from serve.problems import Problem, documented, of_row
from serve.routes import answer, backends, limits, schema_of, takes
from serve.security import admitted

router = APIRouter(tags=["embed"])

_SAID = {"texts": [[0.6, 0.8]], "images": None, "text_encoder": "st:all-MiniLM-L6-v2", "image_encoder": None}


@router.post(
    "/v1/embed",
    summary="Vectors of texts and images",
    response_model=Embedded,
    responses={200: {"content": {"application/json": {"example": _SAID}}}} | documented(401, 404, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=takes({"application/json": {"schema": schema_of(EmbedRequest), "example": {"texts": ["Heart size is normal."]}}}),
    dependencies=[Depends(admitted)],
)
async def embed(request: Request) -> Response:
    """Of `texts`, `images` (base64), or both, in the order given. Their encoders are named: vectors of different ones do not compare."""
    models, bounds = backends(request), limits(request)
    asked = await uploads.record(request, EmbedRequest, bounds)
    if not asked.texts and not asked.images:
        raise Problem(422, "nothing_to_embed", "send `texts`, `images`, or both")
    if len(asked.images or []) > bounds.max_images:
        raise Problem(422, "bad_request", f"at most {bounds.max_images} images")
    made: dict[str, Any] = {}
    if asked.texts:
        vectors = await models.ask("text", "encode", asked.texts)
        if isinstance(vectors, RowError):
            raise of_row(vectors, "a text")
        made |= {"texts": vectors.embedding.tolist(), "text_encoder": (await models.ask("text", "about"))["name"]}
    if asked.images:
        encoded = await models.images([uploads.base64_image(text, f"image {n}") for n, text in enumerate(asked.images, 1)])
        made |= {"images": [list(map(float, one.row["embedding"])) for one in encoded]}
        made |= {"image_encoder": (await models.ask("image", "about"))["name"]}
    return answer(Embedded(**made))
