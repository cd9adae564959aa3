"""The HTTP interface in this process, on canned models: what is answered, and that whatever does not fit is refused in the same form."""

import base64
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import httpx2
import pytest
from fake_backends import STORED, Fake, Method, classified, loaded, looks_like_an_image, quick
from fastapi.testclient import TestClient
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from contracts.chart import Chart
from contracts.errors import RowError
from contracts.findings import FINDINGS
from serve import uploads
from serve.backends import Backends
from serve.gateway import create
from serve.messages import Classified, Embedded, Example, Examples, Found, Models, ProblemDetails, SearchFilter
from serve.problems import Problem
from serve.routes.search import condition
from serve.security import new_key
from serve.settings import GatewaySettings

JPEG = b"\xff\xd8\xff and so on"
CHART = {"age": 67, "sex": "F", "triage": {"heartrate": 104, "temperature": 37.0}}


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[str, str]:
    """(the file, a key in it)"""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return str(file), new_key(file, "page")


def client(keys: tuple[str, str], backends: Backends, **limits: Any) -> TestClient:
    app = create(backends, GatewaySettings(keys=keys[0], **limits))
    return TestClient(app, headers={"X-API-Key": keys[1]})


@pytest.fixture
def api(keys) -> Iterator[TestClient]:
    with client(keys, quick()) as api:
        yield api


def refused(answer: httpx2.Response, status: int, kind: str) -> str:
    """The problem's sentence; its form is checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = ProblemDetails.model_validate_json(answer.content, strict=True)
    assert problem.type == f"urn:cxray:{kind}" and problem.status == status and problem.title and problem.detail
    assert problem.instance == f"urn:uuid:{answer.headers['x-request-id']}"
    assert status not in (429, 503) or int(answer.headers["retry-after"]) >= 1
    return problem.detail


def form(*images: bytes, chart: Any = None) -> dict[str, Any]:
    files: list[tuple] = [("image", (f"{n}.jpg", data)) for n, data in enumerate(images)]
    files += [("chart", (None, chart if isinstance(chart, str) else json.dumps(chart)))] if chart is not None else []
    return {"files": files}


def nested(depth: int) -> str:
    return '{"labs": ' + "[" * depth + "]" * depth + "}"


# ---- what is answered ----


def test_a_study_is_classified_from_images_and_chart(api):
    said = Classified.model_validate(api.post("/v1/classify", params={"evidence": 1, "overlay": 1}, **form(JPEG, JPEG, chart=CHART)).json())
    assert said.images == 2 and said.read == ["image", "chart"] and said.notice == "For research, not for diagnosis."
    assert said.findings[0].probability == pytest.approx(0.267) and said.overlays and len(said.overlays) == 2
    assert said.evidence and said.evidence.passages
    bare = Classified.model_validate(api.post("/v1/classify", params={"evidence": 1, "knowledge": 0}, **form(chart=CHART)).json())
    assert bare.read == ["chart"] and bare.evidence and not bare.evidence.passages


@pytest.mark.parametrize("kind", ["image/jpeg", "image/png", "application/dicom", "Image/JPEG; q=1"])
def test_an_image_may_be_the_whole_body(api, kind):
    said = api.post("/v1/classify", content=JPEG, headers={"Content-Type": kind})
    assert said.status_code == 200 and said.json()["images"] == 1 and said.json()["read"] == ["image"]


def test_a_deployment_gets_the_repaired_chart(keys):
    fusion = Fake(classify=classified)
    with client(keys, quick(fusion=fusion)) as api:
        as_a_file = {"files": [("chart", ("chart.json", json.dumps(CHART), "application/json"))]}
        for sent in (form(chart=CHART), as_a_file, {"json": CHART}, form(chart=CHART | {"age": 300, "bmi": "a lot"})):
            assert api.post("/v1/classify", **sent).status_code == 200
    charts = [asked[1] for asked in fusion.classify.asked]
    assert all(Chart.model_validate(chart) == Chart.model_validate(CHART) for chart in charts[:3])
    assert charts[0]["triage"]["temperature"] == 98.6 and charts[0]["repaired"] == ["triage.temperature"]
    assert charts[3]["age"] is None and charts[3]["implausible"] == ["age"] and charts[3]["unreadable"] == ["bmi"]


def test_search_asks_with_words_an_image_and_a_filter(keys):
    search = Fake(search=lambda question: [])
    with client(keys, quick(search=search)) as api:
        asked = {"text": "effusion", "image": base64.b64encode(JPEG).decode(), "k": 3, "via": "report", "pictures": True}
        asked["filter"] = {"split": ["train", "test"], "view": ["PA", "it's"], "findings": {"Pleural Effusion": 1, "Edema": -1}}
        assert Found.model_validate(api.post("/v1/search", json=asked).json()).matches == []
    question = search.search.asked[0][0]
    assert (question.text, question.image.stored, question.via, question.k, question.pictures) == ("effusion", STORED, "report", 3, True)
    assert question.where == "split IN ('train', 'test') AND view IN ('PA', 'it''s') AND label_pleural_effusion = 1 AND label_edema = -1"


def test_vectors_models_and_examples(api):
    both = Embedded.model_validate(api.post("/v1/embed", json={"texts": ["a", "b"], "images": [base64.b64encode(JPEG).decode()]}).json())
    assert len(both.texts or []) == 2 and both.text_encoder == "toy:" and both.image_encoder == "hog:"
    assert both.images and both.images[0] == pytest.approx([0.6, 0.8])
    assert [m.name for m in Models.model_validate(api.get("/v1/models").json()).models] == ["fusion", "search"]
    (head,) = Examples.model_validate(api.get("/v1/examples").json()).examples
    assert Example.model_validate(api.get(f"/v1/examples/{head.id}").json()).labels == {"Edema": 1}
    refused(api.get("/v1/examples/e2"), 404, "no-such-example")


def test_health_and_readiness_need_no_key(keys):
    def starting() -> None:
        raise ActorUnavailableError("not yet", None)

    with client(keys, quick(fusion=Fake(about=starting))) as api:
        api.headers.clear()
        assert api.get("/healthz").json() == {"status": "ok"}
        refused(api.get("/readyz"), 503, "not-ready")
    with client(keys, quick()) as api:
        api.headers.clear()
        assert api.get("/readyz").json() == {"status": "ready"}


def test_each_answer_has_its_requests_id(api):
    mine = uuid.uuid4()
    for given in (str(mine), mine.hex, str(mine).upper()):
        assert api.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"] == given
    # Whatever might be something else than an id is not taken over: it would stand in the log.
    for given in ("50000001", "John-Doe", "a" * 33, "x" * 5_000, f"{mine}-", ""):
        assert uuid.UUID(api.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"]) != mine


def test_behind_serve_the_id_is_told_once(keys, monkeypatch):
    """Its proxy gives a request an id where it has none, and adds what it has to the answer."""
    monkeypatch.setattr("serve.telemetry.get_replica_context", lambda: None)
    with client(keys, quick()) as api:
        assert "x-request-id" not in api.get("/healthz", headers={"X-Request-ID": str(uuid.uuid4())}).headers
        assert "x-request-id" in api.get("/healthz", headers={"X-Request-ID": "50000001"}).headers


# ---- what is not ----


def test_without_the_model_404_tells_what_is_loaded(keys):
    with client(keys, quick(fusion=None, examples=None)) as api:
        for answer in (api.post("/v1/classify", **form(JPEG)), api.get("/v1/examples")):
            assert refused(answer, 404, "not-loaded").endswith("loaded: image, text, search")
    with client(keys, Backends()) as api:
        for answer in (api.post("/v1/search", json={"text": "a"}), api.post("/v1/embed", json={"texts": ["a"]})):
            assert refused(answer, 404, "not-loaded").endswith("loaded: nothing")
        assert api.get("/readyz").status_code == 200 and api.get("/v1/models").json()["models"] == []


def test_an_unknown_address_or_method(api):
    refused(api.get("/v1/diagnose"), 404, "not-found")
    refused(api.post("/v1/classify/", **form(JPEG)), 404, "not-found")  # and not sent elsewhere, body and all
    answer = api.get("/v1/classify")
    refused(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"


def test_a_bad_image_among_good_ones_is_named(api):
    assert refused(api.post("/v1/classify", **form(JPEG, b"GIF89a", JPEG)), 415, "not-an-image") == "image 2 is no JPEG, PNG or DICOM"
    assert refused(api.post("/v1/classify", **form(JPEG, b"")), 422, "empty-file") == "image 2 is empty"
    image = base64.b64encode(b"GIF89a").decode()
    refused(api.post("/v1/search", json={"image": image}), 415, "not-an-image")
    refused(api.post("/v1/embed", json={"images": [image]}), 415, "not-an-image")


@pytest.mark.parametrize(("reason", "status"), [("too_many_bytes", 413), ("too_many_pixels", 413), ("truncated", 422), ("new_word", 422)])
def test_each_reason_has_its_status(keys, reason, status):
    with client(keys, quick(image=Fake(encode=lambda data: RowError(reason, "/srv/secret")))) as api:
        assert "secret" not in refused(api.post("/v1/classify", **form(JPEG)), status, reason.replace("_", "-"))


def test_what_a_model_cannot_answer_it_says(keys):
    said = {"search": Fake(search=lambda question: RowError("bad_question", "no reports here; search via images"))}
    said["fusion"] = Fake(classify=lambda *args: RowError("nothing_to_read"))
    with client(keys, quick(**said)) as api:
        assert refused(api.post("/v1/search", json={"text": "a"}), 422, "bad-question") == "no reports here; search via images"
        refused(api.post("/v1/classify", **form(chart={})), 422, "nothing-to-read")


@pytest.mark.parametrize(
    ("chart", "says"),
    [
        ({"weight": 80}, "`chart.?`: no such field"),
        ({"sex": "X"}, "`chart.sex`"),
        ({"triage": {"hours": 3}}, "`chart.triage.hours`"),
        ({"vitals": [{}, {"pain": [5]}]}, "`chart.vitals.1.pain`"),
        ({"age": {"years": 67}}, "`chart.age`"),
        ({"age": True}, "`chart.age`"),
        ({"history": [{"code": "I50", "version": "ten"}]}, "`chart.history.0.version`"),
        ({"repaired": 5}, "`chart.repaired`"),
        ({"labs": [{"name": "a", "Jane Doe": 1}]}, "`chart.labs.0.?`: no such field"),
        ({"smith_john_mrn_4711": 1}, "`chart.?`: no such field"),
        ({"vitals": [{}] * 501}, "500 entries"),
        ([1], "JSON object"),
    ],
)
def test_a_chart_that_is_none_is_refused_by_field(api, chart, says):
    assert says in refused(api.post("/v1/classify", **form(chart=chart)), 422, "bad-chart")


NOT_JSON = [
    "",
    "{",
    '{"age": NaN}',
    '{"age": 1e999}',
    f'{{"age": {10**400}}}',
    '{"race": "\\ud800"}',
    nested(300),
    "[" * 100_000,
    "[" + "1," * 100_001 + "1]",
]


@pytest.mark.parametrize("text", NOT_JSON, ids=range(len(NOT_JSON)))
def test_json_is_strict_and_bounded(api, text):
    if len(text) <= uploads.MAX_CHART_BYTES:
        refused(api.post("/v1/classify", **form(chart=text)), 422, "not-json")
    refused(api.post("/v1/search", content=text, headers={"Content-Type": "application/json"}), 422, "not-json")


@pytest.mark.parametrize(
    ("path", "sent", "says"),
    [
        ("search", {}, "nothing-to-ask"),
        ("search", {"text": "  "}, "nothing-to-ask"),
        ("search", {"text": "a", "k": 101}, "bad-request"),
        ("search", {"text": "a", "filter": {"findings": {"Jane Doe": 1}}}, "bad-filter"),
        ("search", {"text": "a", "filter": {"findings": {"Edema": 2}}}, "bad-request"),
        ("search", {"text": "a", "filter": {"view": ["PA\0"]}}, "bad-filter"),
        ("search", {"image": "not base64!"}, "not-base64"),
        ("search", {"image": "é"}, "not-base64"),
        ("embed", {}, "nothing-to-embed"),
        ("embed", {"texts": [], "images": []}, "nothing-to-embed"),
        ("embed", {"images": ["/9j/"] * 9}, "bad-request"),
        ("embed", {"texts": [1]}, "bad-request"),
        ("embed", "texts", "bad-request"),
    ],
)
def test_requests_that_do_not_fit(api, path, sent, says):
    assert "Jane" not in refused(api.post(f"/v1/{path}", json=sent), 422, says)


def test_forms_that_do_not_fit(api):
    refused(api.post("/v1/classify", files={"picture": ("a.jpg", JPEG)}), 422, "bad-form")
    refused(api.post("/v1/classify", **form(*[JPEG] * 9)), 422, "bad-form")
    refused(api.post("/v1/classify", data={"chart": ["{}", "{}"]}, files={"image": ("a", JPEG)}), 422, "bad-form")
    refused(api.post("/v1/classify", files=[("chart", ("c", b"{}"))] * 2), 422, "bad-form")
    image = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + JPEG
    for body in (
        b"",
        b"x",
        b"--b\r\nwhat\r\n\r\n",
        image,
        image + b"\r\n--b\r\n",
        image + b"\r\n--b",
        image + b"\r\n--b\r\n\r\n",
    ):
        refused(api.post("/v1/classify", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"}), 422, "bad-form")
    for boundary in ("", "; boundary=", "; boundary=" + "b" * 5_000, '; boundary="b'):
        refused(api.post("/v1/classify", content=b"x", headers={"Content-Type": f"multipart/form-data{boundary}"}), 422, "bad-form")
    whole = api.post("/v1/classify", content=image + b"\r\n--b--", headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert whole.status_code == 200 and whole.json()["images"] == 1
    refused(api.post("/v1/classify", params={"evidence": "Jane"}, **form(JPEG)), 422, "bad-parameter")


def test_bodies_of_another_kind(api):
    for kind in ("application/x-www-form-urlencoded", "text/plain", "image/gif", ""):
        refused(api.post("/v1/classify", content=b"{}", headers={"Content-Type": kind}), 415, "unsupported-body")
    refused(
        api.post("/v1/search", content=b"text=a", headers={"Content-Type": "application/x-www-form-urlencoded"}), 415, "unsupported-body"
    )


# ---- filters ----

HOSTILE = [
    "' OR 1=1 --",
    "'; DROP TABLE rows; --",
    "\\",
    "\\'",
    "''",
    "PA') OR ('a'='a",
    "$$ $$",
    "e'\\x27'",
    '"view"',
    "éß",
    "%",
    "?",
    "/* ",
]


@pytest.mark.parametrize("view", HOSTILE)
def test_a_filter_is_never_more_than_a_filter(view):
    con = duckdb.connect()
    con.execute("CREATE TABLE rows AS SELECT unnest($1::VARCHAR[]) AS view, 'train' AS split", [[*HOSTILE, "PA"]])
    where = condition(SearchFilter(view=[view], split=["train"]))
    assert where and con.table("rows").filter(where).fetchall() == [(view, "train")]


def test_filters_know_all_findings_and_refuse_what_is_no_view():
    every = condition(SearchFilter(findings=dict.fromkeys(FINDINGS, 0)))
    assert every and every.count(" = 0") == len(FINDINGS)
    assert condition(SearchFilter()) is None and condition(SearchFilter(view=[])) is None
    for view in ("\0", "a\nb", "P" * 65):
        with pytest.raises(Problem):
            condition(SearchFilter(view=[view]))


# ---- models that fail ----


def raising(*errors: BaseException) -> Method:
    """Raises these, one a call, and then answers."""
    left = list(errors)

    def run(*args: Any) -> Any:
        if left:
            raise left.pop(0)
        return looks_like_an_image(*args)

    return Method(run)


def died() -> Exception:
    return RayTaskError("encode", "Jane Doe", ActorDiedError()).as_instanceof_cause()


def test_a_request_whose_replica_died_is_made_again_once(keys):
    image = Fake()
    for errors, status in (
        ((died(),), 200),
        ((ActorDiedError(),), 200),
        ((ActorUnavailableError("Jane Doe", None),), 200),
        ((died(), died()), 503),
    ):
        image.encode = raising(*errors)
        with client(keys, quick(image=image)) as api:
            answer = api.post("/v1/classify", **form(JPEG))
        assert answer.status_code == status and len(image.encode.asked) == 2
        assert status == 200 or "Jane" not in refused(answer, 503, "unavailable")


def test_a_full_queue_is_503_and_not_tried_again(keys):
    image = Fake()
    full = BackPressureError(9, 9)
    for error in (full, RayTaskError("encode", "", full).as_instanceof_cause()):
        image.encode = raising(error)
        with client(keys, quick(image=image)) as api:
            refused(api.post("/v1/classify", **form(JPEG)), 503, "overloaded")
        assert len(image.encode.asked) == 1


def test_a_model_that_gave_up_is_504(keys):
    slow = RayTaskError("encode", "", TimeoutError("slow")).as_instanceof_cause()
    with client(keys, quick(image=Fake(encode=raising(slow).run))) as api:
        refused(api.post("/v1/classify", **form(JPEG)), 504, "too-slow")


def test_one_model_that_is_not_there_does_not_hide_the_others(keys):
    with client(keys, quick(image=None, search=Fake(about=lambda: loaded("search", "/v1/search")))) as api:
        assert {m["name"] for m in api.get("/v1/models").json()["models"]} == {"fusion", "search"}
        refused(api.post("/v1/classify", **form(JPEG)), 404, "not-loaded")
        assert api.post("/v1/classify", **form(chart=CHART)).status_code == 200


def test_the_openapi_names_research_examples_keys_and_every_problem(api):
    said = api.get("/openapi.json").json()
    assert "For research, not for diagnosis." in said["info"]["description"]
    assert set(said["components"]["securitySchemes"]) == {"Bearer", "Key"}
    assert "$defs" not in json.dumps(said) and Path(__file__).name not in json.dumps(said)
    for path, operations in said["paths"].items():
        for operation in operations.values():
            assert operation["tags"] and operation["summary"]
            assert path.startswith("/v1/") == bool(operation.get("security"))
            problems = {status for status, told in operation["responses"].items() if "application/problem+json" in told.get("content", {})}
            assert problems and (not path.startswith("/v1/") or {"401", "429", "500", "503", "504"} <= problems)
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert content["schema"].get("format") == "binary" or "example" in content
    reached = json.dumps(said).split('"#/components/schemas/')[1:]
    assert {name.partition('"')[0] for name in reached} <= set(said["components"]["schemas"])
