"""`cxray serve CONFIG`: what `serve deploy CONFIG` would run, in the foreground, till Ctrl-C.

.venv/bin/cxray serve configs/demo/serve.yaml --ui
"""

import difflib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from contracts.config import load, merge, parse_set, read_yaml
from contracts.errors import CxrayError
from serve.settings import ServeSettings

IMPORT_PATH = "serve.app:app"
FRONT = "serve.front:middlewares"
WITHIN_S = 600  # the largest encoders come from a hub at their first start
LONGER_S = 5  # than the gateway's deadline: the gateway says best why there is no answer
PAGE, PAGE_PORT = "page", 8501  # its key's name, and where it is
KNOWN = {"name", "route_prefix", "import_path", "args"}  # of an application, what is read here


@dataclass(frozen=True)
class Served:
    """What a YAML of `serve deploy` says, of those that `cxray serve` takes."""

    name: str
    prefix: str
    http: dict[str, Any]
    logging: Any
    settings: ServeSettings

    @property
    def address(self) -> str:
        return f"http://{self.http['host']}:{self.http['port']}{self.prefix.rstrip('/')}"


def run(config: Path, sets: Sequence[str] = (), page: bool = False, say: Callable[[str], Any] = print) -> None:
    """Serves until it is stopped. Raises CxrayError for what does not fit, before anything starts where it can be seen there."""
    # Replicas talk to each other by gRPC, and user code shares one loop with Ray's: said before Ray starts, to all that it starts. Not so
    # the gateway's own port beside the proxy's, which would be open to the network.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")
    # Serve counts and looks around ten times a second in every process: on two cores some five of a hundred requests (benchmarks/serve.py).
    os.environ.setdefault("RAY_SERVE_METRICS_EXPORT_INTERVAL_MS", "2000")
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", FRONT)
    served = read(config, sets)
    from serve import app, front

    os.environ[front.MAX_BODY] = str(served.settings.gateway.max_body_bytes)

    graph = app.graph(served.settings)
    keys = Path(app.Graph(served.settings).at(served.settings.gateway.keys).path)
    if os.environ.get("RAY_ADDRESS", "local") == "local":  # elsewhere it may be our own, to be redeployed
        free(served.http["host"], served.http["port"])
    if page:
        free("127.0.0.1", PAGE_PORT)
    started = time.monotonic()
    with cluster(served.name):
        guarded(say)
        start(graph, served)
        say(f"serve: ready after {time.monotonic() - started:.0f} s: {', '.join(served.settings.models) or 'no models'}")
        say(f"  address: {served.address}; what it takes and gives: {served.address}/openapi.json")
        for line in first_key(keys, served.address):
            say(line)
        with shown(served.address, keys) if page else nullcontext([]) as children:
            if page:
                say(f"  page: http://127.0.0.1:{PAGE_PORT}")
            say("  Ctrl-C ends it")
            wait(children)
    say("serve: ended")


def read(config: Path, sets: Sequence[str] = ()) -> Served:
    """Raises CxrayError where the file is not one of `serve deploy`, or asks for what is not done here."""
    from ray.serve.schema import ServeDeploySchema

    values = read_yaml(config)
    for item in sets:
        values = merge(values, parse_set(item))
    if unknown := sorted(values.keys() - ServeDeploySchema.model_fields.keys()):
        near = difflib.get_close_matches(unknown[0], ServeDeploySchema.model_fields, n=1)
        raise CxrayError(f"{config}: unknown key `{unknown[0]}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    try:
        said = ServeDeploySchema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise CxrayError(f"{config}: `{'.'.join(map(str, first['loc']))}`: {first['msg']}") from None
    if len(said.applications) != 1 or said.applications[0].import_path != IMPORT_PATH:
        raise CxrayError(f"{config}: `cxray serve` starts one application, of the import_path {IMPORT_PATH}; use `serve deploy` for others")
    one = said.applications[0]
    if other := sorted(one.model_fields_set - KNOWN):
        raise CxrayError(f"{config}: applications.0.{other[0]}: `cxray serve` does not read it; set it in args, or use `serve deploy`")
    settings = load(ServeSettings, one.args)
    http = said.http_options.model_dump(exclude_unset=True)
    http = {"host": "127.0.0.1", "port": 8000, "request_timeout_s": settings.gateway.deadline_s + LONGER_S} | http
    if http["request_timeout_s"] is not None and http["request_timeout_s"] <= settings.gateway.deadline_s:
        raise CxrayError(f"{config}: http_options.request_timeout_s must be longer than gateway.deadline_s ({settings.gateway.deadline_s})")
    # Serve's own lines hold what clients send, and ids that they made up; the gateway writes safe ones.
    logging = said.logging_config or {"log_level": "WARNING", "enable_access_log": False}
    return Served(one.name, one.route_prefix or "/", http, logging, settings)


def free(host: str, port: int) -> None:
    """Raises CxrayError where something listens there already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CxrayError(f"{host}:{port} cannot be listened on ({error.strerror}); name another in http_options") from None


@contextmanager
def cluster(name: str) -> Iterator[None]:
    """Ray: the cluster of RAY_ADDRESS, from which Ctrl-C takes the application, or one of our own, which ends with it.

    SIGTERM is as Ctrl-C; either one ends what stands inside, and no more. What fails leaves a joined cluster as it is: there, Ray keeps
    the replicas that served before.
    """
    import ray
    from ray import serve

    from pipelines.cluster import connect

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    joined = ray.is_initialized() or os.environ.get("RAY_ADDRESS", "local") != "local"
    before = signal.getsignal(signal.SIGTERM)
    try:
        connect()
        signal.signal(signal.SIGTERM, stop)  # after Ray has set its own, which leaves at once
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if joined:
            serve.delete(name)
    finally:
        if not joined:
            ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def guarded(say: Callable[[str], Any]) -> None:
    """Raises CxrayError for a cluster that whoever reaches it may give commands to; where the environment wants it so, it is only said."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()  # "token" where Ray has turned it on by itself, too
    if mode == "disabled":
        say("  warning: RAY_AUTH_MODE=disabled: whoever reaches Ray's ports may run programs, and read what passes between the models")
    elif mode != "token":
        raise CxrayError(
            "whoever reaches this Ray cluster may run programs on it, and read what passes between the models; start it with "
            "RAY_AUTH_MODE=token, and set that and its token here (or RAY_AUTH_MODE=disabled where its network is closed)"
        )


def start(graph: Any, served: Served) -> None:
    """Deploys, and waits till all replicas have passed their first health check. Raises CxrayError where that does not come."""
    import logging

    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options=served.http, logging_config=served.logging)
    serve.run_many([serve.RunTarget(graph, name=served.name, route_prefix=served.prefix)], wait_for_applications_running=False)
    until = time.monotonic() + WITHIN_S
    while time.monotonic() < until:
        said = serve.status().applications.get(served.name)
        if said is not None and said.status == "RUNNING":
            return
        if said is not None and (why := failure(said)):
            raise CxrayError(why)
        time.sleep(0.1)
    raise CxrayError(f"not ready after {WITHIN_S} s; look at `serve status`, and at /tmp/ray/session_latest/logs/serve")


def failure(said: Any) -> str | None:
    """Of an application's status, why it will not come up: as soon as a replica has said so, in one sentence."""
    messages = [one.message for one in said.deployments.values()] + [said.message]
    for message in messages:
        if told := re.findall(r"CxrayError: (.+)", message):
            return told[-1]
    if said.status != "DEPLOY_FAILED":
        return None
    last = next((line for message in messages for line in reversed(message.strip().splitlines()) if "Error" in line), said.message)
    return f"it does not start: {last.strip()}; more in /tmp/ray/session_latest/logs/serve"


def first_key(file: Path, address: str) -> list[str]:
    """Makes the file of keys where there is none, with one key in it: what to say of it."""
    from serve.security import new_key

    if file.exists():
        return [f"  keys: those of {file}; another one: cxray key NAME --keys {file}"]
    key = new_key(file, "first")
    # Not in the command itself: those of all users can be read in the list of processes, and are kept in a shell's history.
    return [f"  your key, shown this once: {key}", f'  with it in $KEY: curl -H @- {address}/v1/models <<< "X-API-Key: $KEY"']


@contextmanager
def shown(address: str, file: Path) -> Iterator[list[Any]]:
    """The page, with a key of its own: it is made anew at each start, since no key can be read from the file, and ends with the page.

    Whoever reaches the page uses that key and needs none: the page listens on loopback alone, so that is whoever has an account here.
    """
    from serve.security import drop_key, new_key

    drop_key(file, PAGE)  # of one that was killed
    environment = os.environ | {"CXRAY_API": address, "CXRAY_API_KEY": new_key(file, PAGE)}
    environment.pop("RAY_AUTH_TOKEN", None)
    command = [sys.executable, "-m", "cxray", "ui", "--port", str(PAGE_PORT)]
    try:
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
            try:
                yield [child]
            finally:
                child.terminate()
    finally:
        drop_key(file, PAGE)


def wait(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Till a signal. Raises CxrayError where a child has ended by itself."""
    while True:
        time.sleep(0.5)
        if any(child.poll() is not None for child in children):
            raise CxrayError("the page has ended; `cxray ui` says why")
