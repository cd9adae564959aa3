"""What clients send - names, words of notes, ids, keys - stands in no log, metric or answer of the service, whatever became of the request.

These come after all other tests (conftest.py), and scan what those have left behind too: their requests, and the tables that they made
texts of, hold planted words as well.
"""

import base64
import json
from dataclasses import replace
from pathlib import Path

import httpx2
import planted
import psutil
import pytest
from served import settings
from test_predict import jpeg

from serve import app
from serve import run as command

TOLD = {"age": 50, "chief_complaint": planted.NOTE, "medicines": [{"name": planted.MEDICINE, "hours": -1.0}]}
EXIF = jpeg(0)[:2] + b"\xff\xfe\x00\x30" + planted.PATIENT.encode().ljust(46, b".") + jpeg(0)[2:]  # a JPEG with a comment


def told(words: dict | str) -> tuple:
    return ("chart", (None, words if isinstance(words, str) else json.dumps(words)))


def requests(api: httpx2.Client) -> list[httpx2.Response]:
    """Good ones, and bad ones of each kind, all with planted words in them wherever words can be."""
    image = ("image", (planted.FILE, EXIF))
    ids = {"X-Request-ID": planted.PATIENT.replace(" ", "-"), "User-Agent": planted.PATIENT, "Referer": f"http://{planted.STUDY}/"}
    classify, where = "/v1/classify", {"study": planted.STUDY, "name": planted.PATIENT}
    said = [
        api.post(classify, files=[image, told(TOLD)], params=where, headers=ids),
        api.post(classify, files=[image, told(TOLD)], params={"overlay": planted.NOTE}),
        api.post(classify, files=[image, told({"age": planted.PATIENT})]),
        api.post(classify, files=[image, told({"age": 50, planted.MEDICINE: 1})]),
        api.post(classify, files=[image, told({"age": 50, "medicines": [{"name": planted.MEDICINE, "hours": planted.NOTE}]})]),
        api.post(classify, files=[image, told("{" + planted.NOTE)]),
        api.post(classify, files=[("image", (planted.FILE, EXIF[: len(EXIF) // 2]))]),
        api.post(classify, files=[("image", (planted.FILE, planted.NOTE.encode()))]),
        api.post(classify, files=[(planted.FILE, (planted.FILE, EXIF))]),
        api.post(classify, content=planted.NOTE.encode(), headers={"Content-Type": f"text/{planted.MEDICINE}"}),
        api.post(classify, content=b"\0" * 128 + b"DICM" + planted.PATIENT.encode(), headers={"Content-Type": "application/dicom"}),
        api.post("/v1/embed", json={"texts": [planted.NOTE]}),
        api.post("/v1/embed", json={"images": [planted.NOTE]}),
        api.post("/v1/embed", json={"images": [base64.b64encode(planted.PATIENT.encode()).decode()]}),
        api.post("/v1/embed", json={planted.MEDICINE: planted.NOTE}),
        api.post("/v1/search", json={"text": planted.NOTE}),
        api.post("/v1/search", json={"text": planted.NOTE, "filter": {"view": [planted.PATIENT], "findings": {planted.STUDY: 1}}}),
        api.post("/v1/search", json={"image": base64.b64encode(EXIF).decode(), "filter": {"view": [planted.PATIENT]}}),
        api.get(f"/v1/examples/{planted.STUDY}", params=where),
        api.get(f"/{planted.FILE}", params=where),
        api.request("QUISTORP", classify),
        api.delete(classify, params=where),
        api.get("/v1/models", headers={"X-API-Key": planted.WRONG_KEY}),
        api.get("/v1/models", headers={"X-API-Key": "", "Authorization": f"Bearer {planted.WRONG_KEY}"}),
        api.get("/v1/models", headers={"X-API-Key": "", "Authorization": f"Basic {planted.WRONG_KEY}"}),
        api.post(classify, files=[image, told(json.dumps({"chief_complaint": planted.NOTE * 40_000}))]),
    ]
    return [*said, api.get("/metrics"), api.get("/openapi.json"), api.get("/readyz")]


def logs(written: Path) -> dict[str, bytes]:
    """All logs of all Rays that were started since these tests began, and what commands in processes of their own said. written: the
    folder below which the tests write."""
    import ray

    sessions = Path(ray._private.worker._global_node.get_session_dir_path()).parent
    began = psutil.Process().create_time()
    ours = [s for s in sessions.glob("session_*") if not s.is_symlink() and s.stat().st_mtime >= began]
    files = [file for s in ours for file in (s / "logs").rglob("*")] + list(written.rglob("*.log"))
    return {str(file): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def asked(service):
    """(all answers, keys) of the service, of one that refuses by its rate, and of one that has no time."""
    with service.client() as api:
        answers = requests(api)
    for name, gateway in (("refuses", {"rate_per_minute": 1}), ("hurries", {"deadline_s": 0.001})):
        args = settings(service.out, models={})
        beside = replace(service.said, name=name, prefix=f"/{name}")
        command.start(app.app(args | {"gateway": args["gateway"] | gateway}), beside)
        with service.client() as api:
            api.base_url = f"{service.address}/{name}"
            answers += requests(api)
    return answers, (service.key,)


def test_requests_of_every_fate_were_made(asked):
    assert {a.status_code for a in asked[0]} >= {200, 401, 404, 405, 413, 415, 422, 429, 504}


def test_no_answer_repeats_what_was_sent(asked):
    answers, keys = asked
    for answer in answers:
        told = answer.content + repr(answer.headers.raw).encode()
        assert not planted.leaked(told, (*keys, planted.WRONG_KEY)), f"{answer.status_code} of {answer.request.method}: {told[:300]}"


def test_no_log_of_all_tests_holds_what_was_sent(asked, tmp_path_factory):
    found = logs(tmp_path_factory.getbasetemp())
    assert any(b"key=test" in text for name, text in found.items() if "gateway" in name)  # the access log is among them
    keys = (*asked[1], planted.WRONG_KEY)
    assert {name: words for name, text in found.items() if (words := planted.leaked(text, keys))} == {}


def test_no_metric_holds_what_was_sent(asked):
    """The gateway's own are among the answers; these are Ray's, of Ray Serve's proxy and replicas too."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    text = b"".join(httpx2.get(f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics").content for n in nodes)
    assert b"serve" in text
    assert not planted.leaked(text, asked[1])


def test_the_scan_finds_what_is_there():
    assert planted.leaked(f"... {planted.PATIENT.upper()} ...".encode()) == ["zebulonia", "quistorp", "vraxley"]
    assert planted.leaked(b"abc secret", ("secret",)) == ["secret"] and not planted.leaked(b"chest x-ray")
