"""What clients send -> bytes and checked records, in memory only, bounded at every step."""

import base64
import binascii
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from contracts.chart import PLAUSIBLE, Chart
from serve.problems import Problem, of_fields
from serve.settings import GatewaySettings

IMAGES = ("image/jpeg", "image/png", "application/dicom")
# Of a chart: far more than there is to say of a visit to an emergency department. Of prose, the leakage filter reads so much in 0.6 s.
MAX_CHART_BYTES = 1 << 17
MAX_CHART_ROWS = 500  # of each of its lists
MAX_CHART_TEXT = 4_000  # characters of each of its texts; a long indication has some hundred
# Of a JSON: they bound how many values it holds before it is parsed. Base64 has none, and prose one in fifty letters.
MAX_COMMAS = 100_000

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, eq=False)
class Study:
    """What /v1/classify was sent. chart: validated and repaired."""

    images: list[bytes]
    chart: dict[str, Any] | None


async def study(request: Request, limits: GatewaySettings) -> Study:
    """Raises Problem 413, 415 or 422."""
    kind = _media(request)
    if kind in IMAGES:
        return Study([await body(request, limits.max_body_bytes)], None)
    if kind == "application/json":
        return Study([], chart(await body(request, MAX_CHART_BYTES)))
    if kind != "multipart/form-data":
        raise Problem(
            415,
            "unsupported_body",
            f"send multipart/form-data with `image` and `chart`, one image ({', '.join(IMAGES)}), or one chart (application/json)",
        )
    form = await _form(request, limits)
    return Study(form.images, chart(form.charts[0]) if form.charts else None)


class _Form:
    """Collects a form's parts by name as its bytes come, in memory. (Starlette's own class moves files to the disk, and does not notice
    that a last part was cut off.)"""

    def __init__(self, content_type: str, max_images: int) -> None:
        """Raises FormParserError."""
        self.images: list[bytes] = []
        self.charts: list[bytes] = []
        self.whole = False
        self._max_images = max_images
        self._field, self._value, self._disposition = b"", b"", b""
        self._into, self._most = self.images, 0
        self._data: list[bytes] = []
        self._size = 0
        known = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "part_end", "end")
        boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
        self.parser = MultipartParser(boundary, cast(Any, {f"on_{name}": getattr(self, name) for name in known}))

    def part_begin(self) -> None:
        self._disposition, self._data, self._size = b"", [], 0

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def headers_finished(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name")
        if name == b"image":
            self._into, self._most = self.images, sys.maxsize
        elif name == b"chart":
            self._into, self._most = self.charts, MAX_CHART_BYTES
        else:
            raise Problem(422, "bad_form", "a part has no name, or one that is not known here; known: `image`, `chart`")
        if len(self._into) >= (self._max_images if name == b"image" else 1):
            raise Problem(422, "bad_form", f"at most {self._max_images} images and one chart")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._size > self._most:
            raise Problem(413, "too_large", f"`chart` may have {MAX_CHART_BYTES:,} bytes")
        self._data.append(data[start:end])

    def part_end(self) -> None:
        self._into.append(b"".join(self._data))

    def end(self) -> None:
        self.whole = True


async def _form(request: Request, limits: GatewaySettings) -> _Form:
    try:
        form = _Form(request.headers["content-type"], limits.max_images)
        async for chunk in _bounded(request, limits.max_body_bytes):
            form.parser.write(chunk)
    except FormParserError:
        raise Problem(422, "bad_form", "the body is not multipart/form-data") from None
    if not form.whole:
        raise Problem(422, "bad_form", "the form ends before it should")
    return form


async def body(request: Request, most: int) -> bytes:
    """The body, all at once. Raises Problem 413."""
    return b"".join([chunk async for chunk in _bounded(request, most)])


async def _bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes; one that is longer than allowed is refused by what it says of itself, or where it passes the limit."""
    refusal = Problem(413, "too_large", f"a body may have {most:,} bytes", headers={"Connection": "close"})
    said = request.headers.get("content-length", "")
    if said.isascii() and said.isdigit() and (len(said) > 18 or int(said) > most):
        raise refusal
    seen = 0
    async for chunk in request.stream():
        seen += len(chunk)
        if seen > most:
            raise refusal
        yield chunk


async def record(request: Request, kind: type[M], limits: GatewaySettings) -> M:
    """A JSON body as this model. Raises Problem 413, 415 or 422."""
    if _media(request) != "application/json":
        raise Problem(415, "unsupported_body", "send application/json")
    try:
        return kind.model_validate(_json(await body(request, limits.max_body_bytes)))
    except ValidationError as error:
        raise of_fields(error, "bad_request") from None


def chart(text: bytes) -> dict[str, Any]:
    """JSON -> the repaired chart, as a deployment takes it. Raises Problem 413 or 422."""
    if len(text) > MAX_CHART_BYTES:
        raise Problem(413, "too_large", f"`chart` may have {MAX_CHART_BYTES:,} bytes")
    said = _json(text)
    if not isinstance(said, dict):
        raise Problem(422, "bad_chart", "`chart` has to be a JSON object")
    if any(isinstance(value, list) and len(value) > MAX_CHART_ROWS for value in said.values()):
        raise Problem(422, "bad_chart", f"a list of `chart` may have {MAX_CHART_ROWS:,} entries")
    _check_texts(said)
    _check_numbers(said)
    try:
        return Chart.model_validate(said).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise of_fields(error, "bad_chart", "chart.") from None


def _check_texts(said: Any) -> None:
    todo = [said]
    while todo:
        value = todo.pop()
        if isinstance(value, str) and len(value) > MAX_CHART_TEXT:
            raise Problem(422, "bad_chart", f"a text of `chart` may have {MAX_CHART_TEXT:,} characters")
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []


def _check_numbers(said: Mapping[str, Any]) -> None:
    """Numbers may be texts, as they are charted ('7/10'); a list, an object or a truth value is none. Repair takes that for granted."""
    groups = [("", said), ("triage.", said.get("triage"))]
    vitals = said.get("vitals")
    groups += [(f"vitals.{n}.", group) for n, group in enumerate(vitals)] if isinstance(vitals, list) else []
    for prefix, group in groups:
        for name in PLAUSIBLE if isinstance(group, dict) else ():
            if isinstance(group.get(name), list | dict | bool):
                raise Problem(422, "bad_chart", f"`chart.{prefix}{name}`: has to be a number, or a text that holds one")
    for name in ("repaired", "implausible", "unreadable"):
        if not isinstance(said.get(name), list | None):
            raise Problem(422, "bad_chart", f"`chart.{name}`: has to be a list")


def base64_image(text: str, what: str) -> bytes:
    """Raises Problem 422."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Problem(422, "not_base64", f"{what} is not base64") from None


def _media(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _json(text: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN, no number that is infinite or far beyond a double's whole numbers, at most 200 deep, bounded."""
    if text.count(b",") > MAX_COMMAS:
        raise Problem(422, "not_json", "this holds more values than any request has")
    try:
        said = from_json(text, allow_inf_nan=False)
    except ValueError:
        raise Problem(422, "not_json", "this is not JSON, or it is nested too deep") from None
    todo = [said]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, int | float) and not abs(value) < 1 << 63:
            raise Problem(422, "not_json", "a number is too large")
    return said
