"""Words, an image, or both -> the studies most like them."""

from fastapi import APIRouter, Depends, Request, Response

from contracts.errors import RowError
from contracts.findings import FINDINGS, label_column
from serve import uploads
from serve.messages import Found, Question, SearchFilter, SearchRequest
from serve.problems import Problem, documented, of_row
from serve.routes import answer, backends, limits, schema_of, takes
from serve.security import admitted

router = APIRouter(tags=["search"])

_ASKED = {"text": "small left pleural effusion", "filter": {"view": ["PA"], "findings": {"Pleural Effusion": 1}}, "k": 5}
_SAID = {
    "matches": [
        {
            "study_id": "50000001",
            "split": "train",
            "view": "PA",
            "score": 0.71,
            "labels": {"Pleural Effusion": 1},
            "impression": "Small left effusion.",
            "picture": None,
        }
    ],
    "notice": "For research, not for diagnosis.",
}


@router.post(
    "/v1/search",
    summary="Studies like these words, or this image",
    response_model=Found,
    responses={200: {"content": {"application/json": {"example": _SAID}}}} | documented(401, 404, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=takes({"application/json": {"schema": schema_of(SearchRequest), "example": _ASKED}}),
    dependencies=[Depends(admitted)],
)
async def search(request: Request) -> Response:
    """By `text`, `image` (base64), or both; `filter` narrows it down."""
    models = backends(request)
    if "search" not in models:
        await models.ask("search", "search")
    asked = await uploads.record(request, SearchRequest, limits(request))
    text = asked.text if asked.text and asked.text.strip() else None
    if text is None and asked.image is None:
        raise Problem(422, "nothing_to_ask", "send `text`, `image`, or both")
    where = condition(asked.filter) if asked.filter else None
    image = None
    if asked.image is not None:
        image = await models.image(uploads.base64_image(asked.image, "`image`"), "`image`")
    found = await models.ask("search", "search", Question(text, image, asked.via, where, asked.k, asked.pictures))
    if isinstance(found, RowError):
        raise of_row(found, "the question")
    return answer(Found(matches=found))


def condition(given: SearchFilter) -> str | None:
    """The filter as SQL over the index's columns; None where it lets all through. Raises Problem 422.

    Columns come from a fixed list and texts are quoted, so that a filter is never more than a filter. An empty list filters nothing.
    """
    terms = []
    for column, values in (("split", given.split), ("view", given.view)):
        if values:
            terms.append(f"{column} IN ({', '.join(_quoted(value) for value in values)})")
    for finding, state in (given.findings or {}).items():
        if finding not in FINDINGS:
            raise Problem(422, "bad_filter", f"`filter.findings` has an unknown finding; known: {', '.join(FINDINGS)}")
        terms.append(f"{label_column(finding)} = {int(state)}")
    return " AND ".join(terms) or None


def _quoted(text: str) -> str:
    if len(text) > 64 or not text.isprintable():
        raise Problem(422, "bad_filter", "`filter.view`: a view has up to 64 printable characters")
    return "'" + text.replace("'", "''") + "'"
