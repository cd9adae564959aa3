"""What the tests of serving share: a run folder with an index, a YAML to serve them by, and a handle without Ray."""

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from contracts.config import load as read
from contracts.storage import Place, place
from pipelines.search.index import IndexConfig
from pipelines.search.index import run as make_index
from serve.run import FRONT

os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", FRONT)  # before Ray starts, as `cxray serve` does


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
    make_index(read(IndexConfig, {"out": str(out), "features": "features"}))
    return place(out / "fusion")


def settings(out: Path, **more) -> dict:
    models = {"fusion": {}, "search": {}}
    return {"out": str(out), "models": models, "gateway": {"keys": str(out / "keys.json"), "rate_per_minute": 100_000}, **more}


def config(where: Path, args: dict, **more) -> Path:
    one = {"name": "cxray", "route_prefix": "/", "import_path": "serve.app:app", "args": args}
    where.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": free_port()}, "applications": [one], **more}))
    return where


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
