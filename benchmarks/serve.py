"""A service beside its models: requests a second of `cxray serve` over HTTP, and of the same models called without any service.

    .venv/bin/python benchmarks/serve.py [--shape small] [--direct] [--rounds 2]

A fusion run with a ViT/16 (224 px, random weights; bf16 where the hardware has it) and an index are made, and served with all settings as
they come but two replicas of the image encoder, and time-outs of a minute. Classify: X-rays of MIMIC's size (2544 x 3056, 1.6 MB as
JPEG), one a request, from 1, 8 and 64 clients. Bare: `Predictor.predict_batch` on the same images, in as many plain processes as the image
encoder has replicas, each with one thread as a replica has, in batches as large as the service's (16). `to_bare_64`: the service's rate at
64 clients over that. One client stands beside `Predictor.predict`, one call after another (`p50_to_bare`). Search: sentences of five to
fifteen words, from as many clients, over HTTP and by the search deployment's own handle, from a process of its own (`search_to_handle`);
the words' encoder is as wide as the images', a BERT-base or, with the small shapes, all-MiniLM-L6-v2.

The clients run on the same cores: what they take of them is printed with what each process of the service does, a request. Who is
compared with each other comes in turns, `--rounds` times, since a machine's speed drifts; the idle service is there while the bare model
runs. `--direct` shows what Ray's proxy costs: each request passes through it, and its body twice more from process to process.
The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder: `serve` is the package

from serving import world  # noqa: E402 - after the path is set
from serving.apart import Apart, Bare, Handle, Http, apart  # noqa: E402
from serving.clients import Load, Told  # noqa: E402
from serving.seen import cluster, cores, held  # noqa: E402

CLIENTS, BATCH, QUESTIONS = (1, 8, 64), 16, 200


@contextmanager
def served(out: Path, port: int, replicas: int) -> Iterator[tuple[int, str, float]]:
    """`cxray serve` till the end: its process, a key, and how long it took to start."""
    said, begun = (out / "serve.log").open("w"), time.perf_counter()
    command = [sys.executable, "-m", "cxray", "serve", str(world.config(out, port, replicas))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
    try:
        while not ready(port):
            if process.poll() is not None:
                raise SystemExit((out / "serve.log").read_text())
            time.sleep(0.1)
        took = time.perf_counter() - begun
        yield process.pid, key(out), took
    finally:
        process.terminate()
        process.wait()


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def key(out: Path) -> str:
    from serve.security import new_key

    return new_key(out / "keys.json", "benchmark")


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=world.SHAPES, default="base", help="of the image encoder, a ViT/16")
    parser.add_argument("--direct", action="store_true", help="past Ray Serve's proxy: the clients ask the gateway's replica itself")
    parser.add_argument("--images", type=int, default=256, help="requests of 64 clients, a round")
    parser.add_argument("--calls", type=int, default=20, help="requests of one client, a round")
    parser.add_argument("--questions", type=int, default=240, help="searches, a round")
    parser.add_argument("--rows", type=int, default=4000, help="of the index")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=2, help="of the image encoder; and processes of the bare model")
    parser.add_argument("--folder", type=Path, help="where what is served was made before, or is to be kept")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cx") as scratch:
        os.environ |= {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_DIRECT_INGRESS": str(int(asked.direct))}
        # A token of this run's own lets the handle's process into the service's cluster, whatever else runs on this machine.
        token = Path(scratch) / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        out = asked.folder or Path(scratch) / "out"
        if not (out / "fusion").exists():
            out.mkdir(parents=True, exist_ok=True)
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory is given back
                pool.apply(world.make, (out, asked.shape, asked.rows))
        figures = measure(out, asked)
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}))


def measure(out: Path, asked: argparse.Namespace) -> dict[str, Any]:
    port, own, images, texts = free_port(), free_port(), world.pictures(), world.questions(QUESTIONS)
    (out / "keys.json").unlink(missing_ok=True)
    os.environ |= {"RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(own), "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(own + 8)}
    with served(out, port, asked.replicas) as (pid, secret, startup), ExitStack() as ready_to:
        asked_at = own if asked.direct else port
        loads = {
            "classify": Load("127.0.0.1", asked_at, secret, "/v1/classify", "image/jpeg", images),
            "search": Load(
                "127.0.0.1", asked_at, secret, "/v1/search", "application/json", [json.dumps({"text": t}).encode() for t in texts]
            ),
        }
        http = ready_to.enter_context(apart(1, Http, loads))
        bare = ready_to.enter_context(apart(asked.replicas, Bare, str(out), images))
        one = ready_to.enter_context(apart(1, Bare, str(out), images))
        handle = ready_to.enter_context(apart(1, Handle, cluster(pid)))
        found = Rounds(pid, http, handle, bare, one, texts)
        found.warm()
        for _ in range(asked.rounds):
            found.classify(asked)
            found.search(asked)
    return found.figures() | {"shape": asked.shape, "direct": asked.direct, "replicas": asked.replicas, "startup_s": startup}


class Rounds:
    """Contenders in turns, and what each took."""

    def __init__(self, pid: int, http: Apart, handle: Apart, bare: Apart, one: Apart, texts: list[str]) -> None:
        self.pid, self.http, self.handle, self.bare, self.one, self.texts = pid, http, handle, bare, one, texts
        self.told: dict[str, list[Told]] = defaultdict(list)
        self.bare_per_s: list[float] = []
        self.alone: list[float] = []
        self.peak = 0

    def warm(self) -> None:
        self.http("ask", "classify", max(CLIENTS), max(CLIENTS))
        self.http("ask", "search", max(CLIENTS), max(CLIENTS))
        self.handle("search", self.texts, max(CLIENTS), max(CLIENTS))
        self.bare("together", BATCH, BATCH)
        self.one("alone", 3)

    def classify(self, asked: argparse.Namespace) -> None:
        share = -(-asked.images // asked.replicas // BATCH) * BATCH
        self.bare_per_s.append(share * asked.replicas / max(self.bare("together", share, BATCH)))
        print(f"bare model, {asked.replicas} processes: {self.bare_per_s[-1]:.1f} images/s", flush=True)
        for clients in reversed(CLIENTS):
            count = {1: asked.calls, 64: share * asked.replicas}.get(clients, asked.images // 2)
            self._ask("classify", clients, count)
        self.alone += self.one("alone", asked.calls)[0]
        print(f"bare model, one call: {1000 * median(self.alone):.1f} ms", flush=True)

    def search(self, asked: argparse.Namespace) -> None:
        for clients in (8, 64):
            (told,) = self.handle("search", self.texts, clients, asked.questions)
            self._keep(f"handle_{clients}", told)
            self._ask("search", clients, asked.questions)

    def _ask(self, what: str, clients: int, count: int) -> None:
        before = cores(self.pid)
        (told,) = self.http("ask", what, clients, count)
        if set(told.statuses) != {200}:
            raise SystemExit(f"{what}: not all were answered: {told.statuses}")
        after, self.peak = cores(self.pid), max(self.peak, held(self.pid))
        spent = {name: 1000 * (after[name] - before[name]) / count for name in after}
        self._keep(f"{what}_{clients}", told, spent)

    def _keep(self, name: str, told: Told, spent: Mapping[str, float] | None = None) -> None:
        self.told[name].append(told)
        p50, p95 = (1000 * q for q in np.percentile(told.seconds, (50, 95)))
        on_core = "".join(f", {who} {ms:.1f}" for who, ms in sorted((spent or {}).items(), key=lambda of: -of[1]) if ms >= 0.05)
        print(f"{name}: {told.per_s:.1f}/s, p50 {p50:.1f} ms, p95 {p95:.1f} ms; on a core, ms a request: "
              f"asking {1000 * told.cpu / len(told.seconds):.2f}{on_core}", flush=True)  # fmt: skip

    def figures(self) -> dict[str, Any]:
        rate = {name: sum(len(t.seconds) for t in of) / sum(t.wall for t in of) for name, of in self.told.items()}
        taken = {name: 1000 * np.concatenate([t.seconds for t in of]) for name, of in self.told.items()}
        bare = len(self.bare_per_s) / sum(1 / r for r in self.bare_per_s)
        alone = 1000 * np.array(self.alone)
        said: dict[str, Any] = {
            "to_bare_64": rate["classify_64"] / bare,
            "p50_to_bare": float(np.median(taken["classify_1"]) / np.median(alone)),
            "search_to_handle": rate["search_64"] / rate["handle_64"],
            "search_to_handle_8": rate["search_8"] / rate["handle_8"],
            "bare_per_s": bare,
            "bare_p50_ms": float(np.median(alone)),
            "bare_p95_ms": float(np.percentile(alone, 95)),
            "peak_gb": self.peak / 1e9,
        }
        for name in rate:
            said |= {f"{name}_per_s": rate[name]} | {f"{name}_p{q}_ms": float(np.percentile(taken[name], q)) for q in (50, 95)}
        return said


if __name__ == "__main__":
    main()
