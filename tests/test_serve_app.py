"""Through Ray Serve and HTTP a study's answer is the predictor's own, and one bad request spoils no other."""

import base64
import json
import os
import pickle
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import planted
import psutil
import pytest
import torch
from served import config, settings
from test_predict import chart, jpeg, train

from contracts.errors import CxrayError
from contracts.storage import place
from pipelines.search.ask import Index
from serve import app
from serve import run as command


@pytest.fixture(scope="module")
def client(service):
    with service.client() as made:
        yield made


@pytest.fixture(scope="module")
def predictor(service):
    return service.predictor


@pytest.fixture(scope="module")
def out(service):
    return service.out


def classify(client, images=(), told=None, **query):
    files = [("image", (planted.FILE, data)) for data in images] + ([("chart", (None, json.dumps(told)))] if told is not None else [])
    return client.post("/v1/classify", files=files, params=query)


def probabilities(answer) -> dict:
    assert answer.status_code == 200, answer.text
    return {f["name"]: f["probability"] for f in answer.json()["findings"]}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as a replica has
    yield
    torch.set_num_threads(before)


def test_over_http_the_answer_is_the_predictors_own_to_the_last_bit(client, predictor, one_thread):
    for image, told in ((jpeg(0), chart(0)), (jpeg(3), None), (None, chart(5))):
        answer = classify(client, [image] if image else [], told)
        (said,) = predictor.predict_batch([(image, told)])
        assert probabilities(answer) == said.probabilities
        assert {f["name"]: f["threshold"] for f in answer.json()["findings"]} == said.thresholds
        assert answer.json()["read"] == [*(["image"] if image else []), *(["chart"] if told else [])]
    study = predictor.predict_batch([(jpeg(1), chart(1)), (jpeg(2), chart(1))])
    mean = {f: np.mean([s.probabilities[f] for s in study]) for f in predictor.findings}
    answer = classify(client, [jpeg(1), jpeg(2)], chart(1))
    assert probabilities(answer) == mean and answer.json()["images"] == 2


def test_an_answer_says_what_it_rests_on(client, predictor):
    said = predictor.predict(jpeg(0), chart(0), attention=True)
    found = classify(client, [jpeg(0)], chart(0), evidence=True, overlay=True).json()
    assert [s["text"] for s in found["evidence"]["note"]] == [s.text for s in said.note]
    assert [p["id"] for p in found["evidence"]["passages"]] == [p.id for p in said.evidence]
    shares = {s["name"]: s["share"] for s in found["evidence"]["note"]} | {p["id"]: p["share"] for p in found["evidence"]["passages"]}
    assert shares == pytest.approx(said.attention.read, abs=1e-6)
    assert len(found["overlays"]) == len(found["pictures"]) == 1
    without = classify(client, [jpeg(0)], chart(0), evidence=True, knowledge=False).json()
    assert without["evidence"]["passages"] == [] and without["evidence"]["note"]
    assert without["findings"] != found["findings"]
    assert classify(client, [jpeg(0)], chart(0)).json()["evidence"] is None


def test_one_bad_image_spoils_no_other(client, predictor):
    """Sixteen at once, and among them what cannot be read: images and a chart."""
    asked = [(jpeg(n % 8), chart(n % 8)) for n in range(16)]
    asked[3], asked[8] = (jpeg(3)[:900], chart(3)), (b"\xff\xd8\xffno image", None)
    asked[11] = (jpeg(3), {"age": 50, "hart_rate": 1})
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda one: classify(client, [one[0]], one[1]), asked))
    assert [n for n, a in enumerate(answers) if a.status_code != 200] == [3, 8, 11]
    assert {answers[n].status_code for n in (3, 8, 11)} <= {415, 422}
    for n in set(range(16)) - {3, 8, 11}:
        assert probabilities(answers[n]) == pytest.approx(predictor.predict(*asked[n]).probabilities, abs=1e-6)


def test_search_by_an_image_is_the_indexs_own(client, out):
    index = Index(place(out / "index"))
    expected = index.search(None, jpeg(2), None, "split = 'train'", 3)
    asked = {"image": base64.b64encode(jpeg(2)).decode(), "k": 3, "filter": {"split": ["train"]}}
    found = client.post("/v1/search", json=asked).json()["matches"]
    assert [(m["study_id"], m["score"]) for m in found] == [(a.study_id, a.score) for a in expected]
    refused = client.post("/v1/search", json={"text": "effusion"})
    assert refused.status_code == 422 and "no text side" in refused.text and str(out) not in refused.text


def test_a_model_that_is_not_loaded_is_named_with_those_that_are(client):
    refused = client.get("/v1/examples")
    assert refused.status_code == 404 and "fusion" in refused.text and "search" in refused.text
    assert [m["name"] for m in client.get("/v1/models").json()["models"]] == ["fusion", "index"]
    assert client.get("/readyz").status_code == 200


class Runs:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_replicas_take_nothing_from_who_has_not_the_clusters_token(client, tmp_path):
    """Their ports are open to the network, and they load pickles from there."""
    import grpc
    from ray.serve.generated.serve_pb2 import ASGIRequest
    from ray.serve.generated.serve_pb2_grpc import ASGIServiceStub

    ours = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::ServeRepli")]
    ports = {c.laddr.port for p in ours for c in p.net_connections() if c.status == psutil.CONN_LISTEN}

    def knock(port: int, token: str | None, file: Path) -> grpc.StatusCode:
        said = [("authorization", f"Bearer {token}")] if token else []
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as error:
            request = ASGIRequest(pickled_request_metadata=pickle.dumps(Runs(file)))
            ASGIServiceStub(channel).HandleRequest(request, metadata=said, timeout=10)
        return error.value.code()

    for token in (None, "0" * 64):
        assert {knock(port, token, tmp_path / "in") for port in ports} >= {grpc.StatusCode.UNAUTHENTICATED}
        assert ports and not (tmp_path / "in").exists()
    for port in ports:
        knock(port, os.environ["RAY_AUTH_TOKEN"], tmp_path / "ours")
    assert (tmp_path / "ours").exists()  # that is what the token keeps out
    assert os.environ["RAY_AUTH_TOKEN"] not in "".join(p.read_text() for p in [Path.home() / ".ray/auth_token"] if p.exists())


def test_what_the_proxy_says_and_takes(client):
    answer = client.get("/v1/models", headers={"X-Request-ID": b"Jane\xff", "X-Request-Timeout-Seconds": "0.000001"})
    assert answer.status_code == 200 and uuid.UUID(answer.headers["x-request-id"])
    assert client.get("/docs").status_code == 404


def test_what_a_replica_cannot_load_is_one_sentence(client, out, tmp_path):
    from ray import serve

    train(out, {"texts": None, "modalities": ["image", "clinical"], "into": str(tmp_path / "fusion")})  # one that needs no text encoder
    file = tmp_path / "fusion/model/config.json"
    said = json.loads(file.read_text())
    said["encoders"]["image"]["fingerprint"] = "other"
    file.write_text(json.dumps(said))
    args = settings(out, models={"fusion": {"run": str(tmp_path / "fusion")}})
    served = replace(command.read(config(tmp_path / "serve.yaml", args)), name="broken", prefix="/broken")
    with pytest.raises(CxrayError, match="`hog:` has other weights now") as error:
        command.start(app.graph(served.settings), served)
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)
    serve.delete("broken")
    assert client.get("/readyz").status_code == 200
