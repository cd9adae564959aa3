"""The HTTP API as the page calls it. What goes wrong is an `ApiProblem`, with a title and a sentence for the person at the page."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from serve.messages import Classified, Example, Examples, Found, Models, ProblemDetails, SearchRequest

SECONDS = httpx2.Timeout(30.0, connect=5.0)  # the service itself gives up earlier

M = TypeVar("M", bound=BaseModel)


class ApiProblem(Exception):
    """What the service said instead of an answer (status 0: nothing at all), and the id under which its log knows the request."""

    def __init__(self, title: str, detail: str, status: int = 0, request_id: str | None = None) -> None:
        super().__init__(title)
        self.title, self.detail, self.status, self.request_id = title, detail, status, request_id


@cache
def _http() -> httpx2.Client:
    # No proxy that the environment may name: pictures and keys go to the service and nowhere else.
    return httpx2.Client(timeout=SECONDS, trust_env=False)


@dataclass(frozen=True)
class Api:
    """Of one address, with one key (or none). Every call raises ApiProblem."""

    address: str
    key: str | None = None

    def classify(
        self, images: Sequence[bytes], chart: dict[str, Any] | None, *, knowledge: bool = True, reasons: bool = True
    ) -> tuple[Classified, float]:
        """One study -> (what the model says of it, seconds until it was said). reasons: with evidence and overlays."""
        # Names of files may name people, so they stay here. A field without a file name keeps the body multipart without an image too.
        parts: list[Any] = [("image", (f"image-{n}", data, "application/octet-stream")) for n, data in enumerate(images, 1)]
        parts += [("chart", (None, json.dumps(chart)))] if chart is not None else []
        asked = {"evidence": reasons, "overlay": reasons, "knowledge": knowledge}
        start = time.perf_counter()
        said = self._ask(Classified, "POST", "/v1/classify", params={name: str(on).lower() for name, on in asked.items()}, files=parts)
        return said, time.perf_counter() - start

    def search(self, request: SearchRequest) -> Found:
        return self._ask(Found, "POST", "/v1/search", json=request.model_dump(mode="json", exclude_none=True))

    def models(self) -> Models:
        return self._ask(Models, "GET", "/v1/models")

    def examples(self) -> Examples:
        """None at all where the service was given none to show."""
        try:
            return self._ask(Examples, "GET", "/v1/examples")
        except ApiProblem as problem:
            if problem.status == 404:
                return Examples(examples=[])
            raise

    def example(self, name: str) -> Example:
        return self._ask(Example, "GET", f"/v1/examples/{quote(name, safe='')}")

    def _ask(self, kind: type[M], method: str, path: str, **how: Any) -> M:
        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise ApiProblem("This cannot be a key", "A key has letters, digits, - and _ only. Copy it again.")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            answer = _http().request(method, self.address.rstrip("/") + path, headers=headers, **how)
        except (httpx2.UnsupportedProtocol, httpx2.InvalidURL):
            raise ApiProblem("CXRAY_API is not an address", "Write it as http://HOST:PORT, and start the page again.") from None
        except httpx2.TimeoutException:
            raise ApiProblem("The service takes too long", f"{self.address} has not answered in time. Try again.") from None
        except httpx2.HTTPError:
            raise ApiProblem("The service does not answer", f"Nothing answers at {self.address}. Is `cxray serve` running there?") from None
        request_id = answer.headers.get("x-request-id")
        try:
            if answer.is_success:
                return kind.model_validate_json(answer.content)
            said = ProblemDetails.model_validate_json(answer.content)
        except ValidationError:
            detail = "The page and the service may be of different versions, or another program answers at this address."
            raise ApiProblem("The answer makes no sense", detail, answer.status_code, request_id) from None
        wait = answer.headers.get("retry-after")
        detail = " ".join(filter(None, [said.detail, wait and f"Try again in {wait} s."]))
        raise ApiProblem(said.title, detail, answer.status_code, request_id)
