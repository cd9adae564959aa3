"""Errors as RFC 9457 problem details, in fixed words: nothing of a request, a file or an exception is repeated in them."""

from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from contracts.chart import Chart
from contracts.errors import RowError
from contracts.findings import FINDINGS
from serve.messages import EmbedRequest, ProblemDetails, SearchRequest

MEDIA = "application/problem+json"

STATUS = {"not_an_image": 415, "too_many_bytes": 413, "too_many_pixels": 413}  # of a row error's reason; of all others 422
SENTENCES = {
    "not_an_image": "is no JPEG, PNG or DICOM",
    "too_many_bytes": "is too large, or unpacks to too much",
    "too_many_pixels": "has more pixels than an X-ray has",
    "too_small": "has a side of less than 16 pixels",
    "empty_file": "is empty",
    "truncated": "ends before it should",
    "corrupt": "is damaged",
    "corrupt_dicom": "is a damaged DICOM",
    "no_pixels": "is a DICOM without pixels",
    "unsupported_jpeg": "is a JPEG of a kind that is not read (lossless, arithmetic or 12 bits)",
    "unsupported_bits": "is a DICOM with a number of bits a pixel that is not read",
    "unsupported_transfer_syntax": "is a DICOM with a transfer syntax that is not read",
}
SPOKEN = ("bad_question", "bad_chart", "nothing_to_read")  # reasons whose detail is ours: names of fields, what an index can answer
DESCRIPTIONS = {
    401: "no key, or not one of ours",
    404: "no model of that name is loaded here, or there is no such address",
    405: "not a method of this address",
    413: "too large",
    415: "neither a JPEG, a PNG nor a DICOM; or a body of another kind than is taken here",
    422: "could not be read: `type` and `detail` say why",
    429: "more requests than the key's rate allows; `Retry-After` says when to come again",
    500: "a fault of the service; its log has the place under the request's id",
    503: "no room, or a model is starting; `Retry-After` says when to come again",
    504: "not answered within the deadline",
}


class Problem(Exception):
    """A refusal. kind: a short fixed word, for `type` and for counting; detail: a sentence of ours. retry_after: seconds."""

    def __init__(self, status: int, kind: str, detail: str, *, retry_after: int | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(kind)
        self.status, self.kind, self.detail = status, kind, detail
        self.headers = dict(headers or {}) | ({"Retry-After": str(retry_after)} if retry_after is not None else {})

    def response(self, request_id: str) -> Response:
        body = ProblemDetails(
            type=f"urn:cxray:{self.kind.replace('_', '-')}",
            title=HTTPStatus(self.status).phrase,
            status=self.status,
            detail=self.detail,
            instance=f"urn:uuid:{request_id}",
        )
        return Response(body.model_dump_json(), self.status, self.headers, MEDIA)


def of_row(error: RowError, what: str) -> Problem:
    """What a deployment said of one item. what: 'image 2'."""
    if error.reason in SPOKEN:
        return Problem(422, error.reason, error.detail or "this model cannot read what was sent")
    return Problem(STATUS.get(error.reason, 422), error.reason, f"{what} {SENTENCES.get(error.reason, 'could not be read')}")


def of_fields(error: ValidationError | RequestValidationError, kind: str, prefix: str = "") -> Problem:
    """Which fields do not fit, and how; their values are not repeated. Neither are names that are no names of fields."""
    ours = isinstance(error, RequestValidationError)  # parameters of the address: others are not read, so these names are ours
    said = dict.fromkeys(f"`{prefix}{_path(e['loc'], ours)}`: {_complaint(e)}" for e in error.errors()[:8])
    return Problem(422, kind, "; ".join(said))


def _path(loc: Sequence[Any], ours: bool) -> str:
    parts = [str(p) if ours or isinstance(p, int) or p in FINDINGS or p in _fields() else "?" for p in loc]
    return ".".join(parts) or "body"


@cache
def _fields() -> frozenset[str]:
    """All names of what clients may send; a name that is none of these may be anybody's."""
    schemas = [model.model_json_schema() for model in (Chart, SearchRequest, EmbedRequest)]
    tables = [table for schema in schemas for table in (schema, *schema.get("$defs", {}).values())]
    return frozenset(name for table in tables for name in table.get("properties", {}))


def _complaint(error: Mapping[str, Any]) -> str:
    """pydantic's words for what was expected; they name the schema's own bounds and choices. A validator of ours might repeat a value."""
    if error["type"] == "extra_forbidden":
        return "no such field"
    return "does not fit" if error["type"] in ("value_error", "assertion_error") else error["msg"]


def install(app: FastAPI) -> None:
    """Every error that a route or the framework raises becomes a problem; FastAPI's own answers repeat what was sent."""

    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        exchange = request.state.exchange
        exchange.refused = error.kind
        return error.response(exchange.id)

    async def unfit(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await problem(request, of_fields(error, "bad_parameter"))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        kind = HTTPStatus(status).phrase.lower().replace(" ", "_")
        return await problem(request, Problem(status, kind, DESCRIPTIONS.get(status, "the request does not fit"), headers=error.headers))

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(HTTPException, http)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI of these answers."""
    schema = {"$ref": "#/components/schemas/ProblemDetails"}
    return {status: {"description": DESCRIPTIONS[status], "content": {MEDIA: {"schema": schema}}} for status in statuses}
