"""The page's parts, without Streamlit's script: how it is started, what it asks the service, and what it draws of the answers."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartParser
from test_house import imports
from ui_server import classify

from contracts.errors import CxrayError
from serve.messages import Classified, Evidence, Finding, Match, PassageRead, SegmentRead
from serve.settings import GatewaySettings
from serve.ui import drawn
from serve.ui import run as start
from serve.ui.client import Api, ApiProblem

UI = Path(start.__file__).parent
OURS = {"contracts.chart", "contracts.errors", "contracts.findings", "contracts.pages", "serve.messages"}


# ---- a client of the API and nothing more ----


@pytest.mark.parametrize("file", sorted(UI.rglob("*.py")), ids=lambda f: f.name)
def test_the_page_takes_nothing_of_ours_but_what_the_api_speaks(file):
    for module, names in imports(file):
        if module.partition(".")[0] in ("contracts", "models", "pipelines", "evaluation", "trainers", "serve"):
            assert module in OURS or f"{module}.".startswith("serve.ui."), f"{file.name} imports {module} ({names})"


def test_the_page_loads_no_model_library():
    heavy = "('torch', 'ray', 'cv2', 'duckdb', 'faiss', 'pydicom')"
    said = f"import sys; from serve.ui.views import compare, models, search, study; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", said], cwd=UI.parents[1], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


# ---- how it is started ----


def test_it_is_for_this_machine_and_tells_nobody(monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("streamlit.web.cli.main", lambda args, **_: asked.extend(args))
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 1 << 20)
    start.run(8123)
    said = dict(zip(asked[2::2], asked[3::2], strict=True))
    assert (said["--server.address"], said["--server.port"]) == ("127.0.0.1", "8123")
    assert said["--browser.gatherUsageStats"] == said["--client.showErrorLinks"] == "false"
    assert said["--client.showErrorDetails"] == "none"
    assert int(said["--server.maxUploadSize"]) << 20 == GatewaySettings().max_body_bytes, "as much as the gateway takes"


def test_without_streamlit_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(start, "find_spec", lambda _: None)
    with pytest.raises(CxrayError, match=r"cxray\[ui\]"):
        start.run(8123)


def rolled_to_disk(size: int) -> bool:
    """Whether an upload of so many bytes went to disk."""
    body = b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + bytes(size) + b"\r\n--x--\r\n"

    async def parse() -> Any:
        async def stream():
            yield body

        return await MultiPartParser(Headers({"content-type": "multipart/form-data; boundary=x"}), stream()).parse()

    return asyncio.run(parse())["f"].file._rolled


def test_uploads_stay_in_memory(monkeypatch):
    monkeypatch.setattr(MultiPartParser, "spool_max_size", 1 << 20)
    assert rolled_to_disk(3 << 20), "as Starlette does by itself"
    start.keep_uploads_in_memory()
    assert not rolled_to_disk(start.LARGEST_MIB << 20)


# ---- what it asks ----


@pytest.fixture
def answered(monkeypatch) -> Callable[..., list[httpx2.Request]]:
    """Let every request be answered so (a response, or an exception) -> the requests, as they come."""

    def use(answer: httpx2.Response | Exception) -> list[httpx2.Request]:
        asked = []

        def handle(request: httpx2.Request) -> httpx2.Response:
            asked.append(request)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr("serve.ui.client._http", lambda: httpx2.Client(transport=httpx2.MockTransport(handle)))
        return asked

    return use


API = Api("http://127.0.0.1:8000/", "s3cret")
PROBLEM = {"title": "Too Many Requests", "status": 429, "detail": "this key has 600 requests a minute"}


def refused(answered, answer: httpx2.Response | Exception, api: Api = API) -> ApiProblem:
    answered(answer)
    with pytest.raises(ApiProblem) as problem:
        api.models()
    assert problem.value.title and problem.value.detail and "s3cret" not in f"{problem.value!r} {problem.value.detail}"
    return problem.value


def test_a_problem_is_told_with_its_sentence_its_request_and_when_to_come_again(answered):
    headers = {"retry-after": "7", "x-request-id": "abc", "content-type": "application/problem+json"}
    said = refused(answered, httpx2.Response(429, json=PROBLEM, headers=headers))
    assert (said.title, said.status, said.request_id) == ("Too Many Requests", 429, "abc")
    assert said.detail == "this key has 600 requests a minute Try again in 7 s."


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        (httpx2.ConnectError("no"), "The service does not answer"),
        (httpx2.ReadTimeout("slow"), "The service takes too long"),
        (httpx2.Response(200, text="<html>another program</html>"), "The answer makes no sense"),
        (httpx2.Response(502, text="bad gateway"), "The answer makes no sense"),
        (httpx2.Response(302, headers={"location": "http://elsewhere/"}), "The answer makes no sense"),
    ],
)
def test_whatever_else_goes_wrong_is_a_sentence(answered, answer, title):
    assert refused(answered, answer).title == title


@pytest.mark.parametrize("address", ["", "localhost:8000", "ftp://x", "http://[", "http://:x"])
def test_an_address_that_is_none_is_said(address):
    with pytest.raises(ApiProblem) as problem:
        Api(address).models()
    assert problem.value.title in ("CXRAY_API is not an address", "The service does not answer")


@pytest.mark.parametrize("key", ["with\nnewline", "kéy"])
def test_a_key_that_can_be_none_is_not_sent(answered, key):
    asked = answered(httpx2.Response(200))
    with pytest.raises(ApiProblem, match="cannot be a key"):
        Api("http://127.0.0.1:8000", key).models()
    assert not asked


def test_keys_stand_in_a_header_only_and_names_of_files_stay_here(answered):
    said = classify([], {"age": 1}, False, False, True)
    asked = answered(httpx2.Response(200, text=said.model_dump_json()))
    API.classify([b"one", b"two"], {"age": 1.0}, knowledge=False)
    (request,) = asked
    assert request.headers["authorization"] == "Bearer s3cret" and "s3cret" not in str(request.url)
    assert request.url.path == "/v1/classify" and dict(request.url.params) == {"evidence": "true", "overlay": "true", "knowledge": "false"}
    body = request.read()
    assert body.count(b'name="image"; filename="image-') == 2 and b'{"age": 1.0}' in body


def test_an_example_s_id_cannot_lead_elsewhere(answered):
    asked = answered(httpx2.Response(404, json=PROBLEM))
    with pytest.raises(ApiProblem):
        API.example("../../metrics?x")
    assert asked[0].url.raw_path == b"/v1/examples/..%2F..%2Fmetrics%3Fx"


def test_a_service_without_examples_has_none_to_choose(answered):
    answered(httpx2.Response(404, json=PROBLEM))
    assert API.examples().examples == []


# ---- what it draws ----

HOSTILE = '<img src=x onerror="alert(1)">&\'"'


def finding(name: str, probability: float, threshold: float = 0.5) -> Finding:
    return Finding(name=name, probability=probability, threshold=threshold, positive=probability >= threshold)


def said(*findings: Finding) -> Classified:
    return Classified(**{"model": "m", "calibrated": True, "findings": list(findings), "images": 1, "read": ["image"]})


def test_nothing_that_is_drawn_can_be_more_than_text():
    segment = SegmentRead(name=HOSTILE, text=HOSTILE, share=0.5)
    passage = PassageRead(id=HOSTILE, topic=HOSTILE, text=HOSTILE, source=HOSTILE, score=0.5, asked_by=HOSTILE, share=0.5)
    evidence = Evidence(note=[segment], passages=[passage])
    match = Match(study_id=HOSTILE, split=HOSTILE, view=HOSTILE, score=1, labels={HOSTILE: 1}, impression=HOSTILE, picture=HOSTILE)
    one = said(finding(HOSTILE, 0.5))
    for page in (
        drawn.problem(HOSTILE, HOSTILE, HOSTILE),
        drawn.notice(HOSTILE, HOSTILE),
        drawn.findings(one),
        drawn.compared(one, one),
        drawn.pictures([HOSTILE], [HOSTILE], 1),
        drawn.note(evidence),
        drawn.passages(evidence),
        drawn.truth(HOSTILE, {HOSTILE: 1}, one),
        drawn.matches([match]),
        drawn.table([(HOSTILE, HOSTILE)], (HOSTILE,), HOSTILE),
    ):
        assert "onerror" in page and "<img src=x" not in page and 'onerror="' not in page


def test_findings_are_told_by_word_and_shape_positive_ones_first():
    page = drawn.findings(said(finding("Low", 0.1), finding("Near", 0.7, 0.8), finding("Rare", 0.2, 0.1), finding("Sure", 0.9)))
    rows = page.split("<li ")[1:]
    assert [name for row in rows for name in ("Low", "Near", "Rare", "Sure") if f">{name}<" in row] == ["Sure", "Rare", "Near", "Low"]
    assert [('class="row on"' in row, "not positive" in row) for row in rows] == [(True, False)] * 2 + [(False, True)] * 2
    assert "width:20.0%" in rows[1] and "left:10.0%" in rows[1] and "0.20 of 1, threshold" in rows[1]


def test_differences_are_marked_the_largest_first():
    a = said(finding("Same", 0.501, 0.9), finding("Down", 0.6), finding("Up", 0.1))
    b = said(finding("Same", 0.503, 0.9), finding("Down", 0.3), finding("Up", 0.7))
    same, down, up = reversed(drawn.compared(a, b).split("<li ")[1:])
    assert "▲ +0.60" in up and "becomes positive" in up
    assert "▼ -0.30" in down and "no longer positive" in down
    assert "= the same" in same and "+0.00" not in same and "positive" not in same
