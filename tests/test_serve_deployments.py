"""The deployments without Ray: what the network is shown is what it was trained on, byte for byte, and health is what a model says."""

# ruff: noqa: F811 - fixtures that come from another file are arguments here

import asyncio
import json
import shutil
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from served import Here, run, settings  # noqa: F401 - a fixture among them
from test_predict import chart, jpeg, out, predictor, trained_on  # noqa: F401 - fixtures among them

from contracts.errors import CxrayError, RowError
from contracts.storage import place
from pipelines.images.decode import decode
from serve import app, deployments, routes
from serve.backends import Backends
from serve.deployments.fusion import Fusion, Settings
from serve.deployments.image import ImageEncoder, ImageSource
from serve.deployments.search import Search
from serve.deployments.search import Settings as SearchSettings
from serve.deployments.text import RemoteText, TextDeployment, TextSource, size
from serve.gateway import create
from serve.messages import Encoded, Question
from serve.security import new_key
from serve.settings import Batched
from serve.worker import Worker, together


@pytest.fixture(scope="module")
def made(run):
    said = json.loads((run / "model/config.json").read())
    return SimpleNamespace(
        image=ImageEncoder(Batched(), ImageSource(said["encoders"]["image"], None, said["dicom"])),
        text=TextDeployment(Batched(), TextSource(said["encoders"]["text"]["name"], said["encoders"]["text"]["fingerprint"])),
        fusion=Fusion(Settings(), run, None, None, None),
    )


def shown(made, numbers, pictures=jpeg, charts=chart) -> tuple[list, Here]:
    """What the deployments make of these patients' requests, the network's parts of each; and the handle by which texts were encoded."""

    async def encode(texts):
        return made.text.together([["another request's"], texts])[1]

    async def ask():
        remote = RemoteText(SimpleNamespace(encode=handle, count=counts), await made.text.about(), asyncio.get_running_loop(), 15)
        return await asyncio.to_thread(made.fusion.read, made.fusion.model.inputs(remote), [(charts(n), True) for n in numbers])

    handle, counts = Here(encode), Here(made.text.count)
    opened = [made.image.opened(pictures(n)) for n in numbers]
    rows = made.image.rows([picture for _, picture in opened])
    encoded = [Encoded(row, stored) for row, (stored, _) in zip(rows, opened, strict=True)]
    parts = [made.fusion.parts([one], *known)[0] for one, known in zip(encoded, asyncio.run(ask()), strict=True)]
    return parts, handle


def test_what_the_deployments_show_the_network_is_what_it_was_trained_on(out, made):
    task, rows = trained_on(out, "train")
    parts, handle = shown(made, range(4))
    assert handle.calls == 1  # a batch's texts travel together, and once
    together, stored = made.fusion.model.tensors(parts)[0], task.collate(rows)
    for name in ("image", "embedding", "text", "text_mask", "kinds", "clinical", "known", "presence"):
        assert together[name].dtype == stored[name].dtype
        assert together[name].numpy().tobytes() == stored[name].numpy().tobytes(), name
    other = made.fusion.model.tensors(shown(made, [1])[0])[0]
    assert all(other[name].numpy().tobytes() != stored[name][:1].numpy().tobytes() for name in ("image", "clinical"))


def test_a_text_too_long_is_cut_as_in_training(made, predictor):
    """The way on which notes are counted, cut and then encoded: once as they are, and once what was cut of them."""
    long = chart(0) | {"medicines": [{"name": f"medicine number {n}", "hours": -1.0} for n in range(200)]}
    parts, handle = shown(made, [0], charts=lambda _: long)
    (expected,) = predictor.parts([predictor.opened(jpeg(0), long)])
    assert parts[0].reading.cut and parts[0].reading.note == expected.reading.note
    assert parts[0].reading.vectors.tobytes() == expected.reading.vectors.tobytes()
    assert handle.calls == 2


def test_what_cannot_be_read_is_an_answer_in_its_place(made):
    said = [made.image.opened(data) for data in (b"", b"words", jpeg(0)[:900], jpeg(0))]
    assert [s.reason if isinstance(s, RowError) else "" for s in said] == ["empty_file", "not_an_image", "truncated", ""]
    found = made.fusion.read(None, [({"age": 50}, True), ({"hart_rate": 1}, True), ({"sex": "F"}, True)])
    assert [isinstance(one, RowError) for one in found] == [False, True, False]


def test_requests_that_come_while_a_batch_is_computed_wait_for_the_next_one():
    async def scene():
        worker, go, seen = Worker(5), threading.Event(), []
        busy = asyncio.create_task(worker.run(go.wait))
        await asyncio.sleep(0)
        later = [asyncio.create_task(worker.free()) for _ in range(3)]
        await asyncio.sleep(0)
        seen.append([task.done() for task in later])
        go.set()
        await busy
        await asyncio.gather(*later)
        return seen

    assert asyncio.run(scene()) == [[False] * 3]


def test_a_model_that_does_not_answer_is_given_up():
    async def scene():
        worker, go = Worker(0.05), threading.Event()
        with pytest.raises(TimeoutError):
            await worker.run(go.wait)
        with pytest.raises(TimeoutError):
            await worker.free()  # the thread still computes: who came now would stand behind it
        worker.timeout_s = 60
        later = asyncio.create_task(worker.run(lambda: "again"))
        go.set()
        return await later

    assert asyncio.run(scene()) == "again"


def test_a_thread_that_works_is_healthy_and_one_that_hangs_is_not():
    async def scene():
        worker, go = Worker(60, threads=2), threading.Event()
        assert await worker.probe(lambda: "said") == "said"
        worker.timeout_s = 0.1
        jobs = [asyncio.create_task(worker.run(go.wait)) for _ in range(2)]
        await asyncio.sleep(0)  # till they have begun
        worker._ended = time.monotonic() + 60  # something has ended just now
        assert await worker.probe(lambda: "said") is None
        worker._ended = -1e9
        with pytest.raises(TimeoutError):
            await worker.probe(lambda: "said")
        worker._begun = dict.fromkeys(worker._begun, time.monotonic() - 60)
        with pytest.raises(RuntimeError, match="at one job"):
            await worker.probe(lambda: "said")
        go.set()
        await asyncio.gather(*jobs, return_exceptions=True)
        await worker.free()

    asyncio.run(scene())


def test_a_hanging_thread_is_seen_wherever_it_is(made, run):
    search = Search(SearchSettings(), place(run.local.parent / "index"), None, None, {})
    for one, name in ((made.image, "_decoders"), (made.image, "_worker"), (made.fusion, "_reader"), (made.fusion, "_network"),
                      (made.text, "_worker"), (search, "_worker")):  # fmt: skip
        worker, job = getattr(one, name), Future()
        worker._begun[job] = time.monotonic() - 1000
        with pytest.raises(RuntimeError, match="at one job"):
            asyncio.run(one.check_health())
        del worker._begun[job]
        asyncio.run(one.check_health())


def test_what_nobody_waits_for_is_taken_back():
    class Response:
        cancelled = False

        def __await__(self):
            return asyncio.Event().wait().__await__()

        def cancel(self):
            self.cancelled = True

    async def scene():
        response = Response()
        about = {"name": "x", "fingerprint": "f", "dim": 3, "context": 8, "joint": False}
        handle = SimpleNamespace(count=SimpleNamespace(remote=lambda texts: response))
        text = RemoteText(handle, about, asyncio.get_running_loop(), 0.01)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(text.count_tokens, ["a"])
        await asyncio.sleep(0)
        return response.cancelled

    assert asyncio.run(scene())


def test_where_one_fails_the_others_are_given_up():
    given_up = []

    async def fails():
        raise KeyError("first")

    async def goes_on():
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            given_up.append(True)
            raise

    with pytest.raises(KeyError, match="first"):
        asyncio.run(together([goes_on(), fails()]))
    assert given_up

    async def says(what):
        return what

    assert asyncio.run(together(says(n) for n in range(3))) == [0, 1, 2]


def test_a_batch_of_texts_is_as_much_work_whatever_its_requests():
    assert size([["a"] * 1000]) == 1  # by itself it is a batch
    assert size([["a"]] * 16) == 16 and size([["a"] * 64] * 2) == 16


def test_without_knowledge_nothing_is_fetched(made, monkeypatch):
    asked = []
    inputs = made.fusion.model.inputs(made.text.encoder)
    find = inputs.knowledge.find
    monkeypatch.setattr(inputs.knowledge, "find", lambda questions, cfg: asked.append(len(questions)) or find(questions, cfg))
    with_, without = (reading for _, reading in made.fusion.read(inputs, [(chart(0), True), (chart(0), False)]))
    assert asked == [1] and with_.evidence and not without.evidence
    assert with_.note == without.note and with_.vectors.tobytes() == without.vectors.tobytes()


def test_damaged_pictures_spoil_no_search_and_all_are_read_at_once(made, run):
    search = Search(SearchSettings(), place(run.local.parent / "index"), None, None, {})
    stored, _ = made.image.opened(jpeg(1))
    asked = []
    files = {"a": stored, "b": b"damaged"}
    search.pictures = SimpleNamespace(read=lambda ids: asked.append(list(ids)) or {i: files[i] for i in ids if i in files})
    drawn = search.thumbnails(["a", "b", "gone"])
    assert drawn["a"] and drawn["b"] is None and drawn["gone"] is None
    assert search.thumbnails(["a", "b"])["a"] == drawn["a"]
    assert asked[0] == ["a", "b", "gone"] and not any(asked[1:])


def test_an_upload_has_fewer_pixels_than_a_job_may_read(made):
    large = np.zeros((8000, 8000), np.uint8)
    data = cv2.imencode(".jpg", large)[1].tobytes()
    assert made.image.opened(data).reason == "too_many_pixels"
    assert decode(data, at_least=518).width == 8000


def test_health_is_what_the_model_says_and_not_that_it_is_there(run, made):
    search = Search(SearchSettings(), place(run.local.parent / "index"), None, None, {})
    whole = [made.image, made.text, made.fusion, search]
    for one in whole:
        asyncio.run(one.check_health())
    broken = Fusion(Settings(), run, None, None, None)
    with torch.no_grad():
        for weights in broken.model.network.parameters():
            weights.fill_(torch.nan)
    image = ImageEncoder(Batched(), made.image.source)
    image.encoder = SimpleNamespace(grid=7)
    text = TextDeployment(Batched(), TextSource(made.text.encoder.name, None))
    text.encoder.embed = lambda texts: np.ones((len(texts), 384), np.float32)
    search.index.images.index.reset()
    for one in (broken, image, text, search):
        with pytest.raises(Exception):  # noqa: B017 - Ray asks only whether
            asyncio.run(one.check_health())


def test_an_image_index_of_another_encoder_sees_the_picture_again(made, run):
    """Where search and classify were made with different encoders, the gateway's is not search's."""
    search = Search(
        SearchSettings(), place(run.local.parent / "index"), None, SimpleNamespace(encode_stored=Here(lambda stored: again(stored))), {}
    )

    async def again(stored):
        found = deployments.image._opened(stored)
        return Encoded(made.image.rows([found[1]])[0], found[0])

    stored, picture = made.image.opened(jpeg(2))
    theirs = Encoded({"embedding": np.zeros(3, np.float32)}, stored)
    found = asyncio.run(search.search(Question(None, theirs, None, None, 1, False)))
    ours = search.index.search(None, made.image.rows([picture])[0]["embedding"][None], None, None, 1)
    assert found[0].study_id == ours[0].study_id


def names(application) -> dict:
    """What the gateway is given: deployments by the name it asks them by."""
    handles = application._bound_deployment.init_args[0]
    return {name: bound._bound_deployment.name for name, bound in handles.items()}


def test_encoders_are_shared_where_they_are_the_same(out, run, tmp_path):
    same = app.app(settings(out))
    assert names(same) == {"image": "image", "text": "text", "fusion": "fusion", "search": "search"}
    shutil.copytree(out / "index", tmp_path / "index")
    file = tmp_path / "index/model/config.json"
    said = json.loads(file.read_text())
    said["image_encoder"]["fingerprint"] = "other"
    file.write_text(json.dumps(said))
    other = app.app(settings(out, models={"fusion": {}, "search": {"run": str(tmp_path / "index")}}))
    search = other._bound_deployment.init_args[0]["search"]._bound_deployment
    assert search.init_args[3]._bound_deployment.name == "image-2" and names(other)["image"] == "image"


TOY = """
from serve.settings import Scale

class Settings(Scale):
    word: str

def build(graph, settings):
    return graph.deploy("toy", Toy, settings)

class Toy:
    def __init__(self, settings):
        self.word = settings.word

    async def say(self):
        return self.word

    async def about(self):
        return {"name": "toy"}
"""
ROUTE = """
from fastapi import APIRouter, Depends, Request
from serve.routes import backends
from serve.security import admitted

router = APIRouter()

@router.get("/v1/toy", dependencies=[Depends(admitted)])
async def toy(request: Request) -> dict:
    return {"word": await backends(request).ask("toy", "say")}
"""


def test_a_new_model_is_a_deployment_and_a_route(tmp_path, monkeypatch):
    for package, text in ((deployments, TOY), (routes, ROUTE)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / "toy.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    keys = tmp_path / "keys.json"
    graph = app.app({"out": str(tmp_path), "models": {"toy": {"word": "hello", "replicas": 2}}, "gateway": {"keys": str(keys)}})
    handles, limits = graph._bound_deployment.init_args
    toy = handles["toy"]._bound_deployment
    assert (toy.name, toy.num_replicas) == ("toy", 2)
    one = toy.func_or_class(*toy.init_args)
    with TestClient(create(Backends(toy=SimpleNamespace(say=Here(one.say), about=Here(one.about))), limits)) as client:
        assert client.get("/v1/toy", headers={"X-API-Key": new_key(keys, "test")}).json() == {"word": "hello"}
        assert client.get("/v1/toy").status_code == 401
        assert client.get("/readyz").status_code == 200
    with pytest.raises(CxrayError, match="unknown key `wrod`: did you mean `word`"):
        app.app({"models": {"toy": {"wrod": "x"}}})
