"""The graph of deployments that Ray Serve runs: `import_path: serve.app:app`, with serve/settings.py's `ServeSettings` as its `args`.

A model is a file in serve/deployments, a line in `models`, and a file in serve/routes. Encoders are shared: models that were made with
the same one ask the same deployment.
"""

import json
import os
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray.serve import Application, deployment, ingress

from contracts.config import load, read_yaml
from contracts.errors import CxrayError
from contracts.storage import Place, place
from serve import deployments
from serve.deployments.image import ImageEncoder, ImageSource
from serve.deployments.text import TextDeployment, TextSource
from serve.gateway import Backends, create
from serve.settings import GatewaySettings, Scale, ServeSettings

COME_AGAIN = 1.0  # seconds, told to who is turned away
ENCODERS = ("image", "text")  # files that hold no model of their own


def app(args: Mapping[str, Any]) -> Application:
    """What `serve deploy`, `serve build` and `cxray serve` build. Raises CxrayError for a wrong setting or a missing folder."""
    return graph(load(ServeSettings, args))


def __getattr__(name: str) -> Application:
    """`serve build serve.app:built` wants an application, and no builder: here it is, of the config that CXRAY_SERVE names, or of none."""
    if name != "built":
        raise AttributeError(name)
    config = os.environ.get("CXRAY_SERVE")
    return app(read_yaml(Path(config))["applications"][0]["args"] if config else {})


def graph(settings: ServeSettings) -> Application:
    made, models = Graph(settings), {}
    there = sorted({module.name for module in pkgutil.iter_modules(deployments.__path__)} - set(ENCODERS))
    if unknown := [name for name in settings.models if name not in there]:
        raise CxrayError(f"models.{unknown[0]}: no such model; there are {', '.join(there)}")
    for name, values in settings.models.items():
        file = import_module(f"serve.deployments.{name}")
        models[name] = file.build(made, load(file.Settings, values))
    keys = made.at(settings.gateway.keys).local
    if keys is None:
        raise CxrayError("gateway.keys: name a file on the gateway's machine; with `out` in a bucket, by its whole path")
    limits = settings.gateway.model_copy(update={"keys": str(keys)})
    overload = {"status_code": 503, "retry_after_s": COME_AGAIN}
    gateway = deployment(name="gateway", backpressure_config=overload, **options(limits))
    return gateway(ingress()(Gateway)).bind(made.first | models, limits)


class Gateway:
    """serve/gateway.py's app, in a replica."""

    def __init__(self, handles: dict[str, Any], limits: GatewaySettings) -> None:
        self.handles, self.limits = handles, limits

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create(Backends(**self.handles), self.limits)


class Graph:
    """What is bound so far. first: the encoders by which the gateway encodes uploads and texts, those of the model named first."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.first: dict[str, Application] = {}
        self._encoders: dict[str, Application] = {}

    def at(self, name: str) -> Place:
        """A run folder's or data set's name -> where it is, the same from every process."""
        where = self.settings.at(name)
        return where if where.local is None else place(where.local, where.options)

    def json(self, run: Place, name: str, missing: str) -> dict[str, Any]:
        """What a folder says of itself. Raises CxrayError, with what is `missing`, where it says nothing."""
        file = run / name
        if not file.exists():
            raise CxrayError(f"{run}: {missing}")
        try:
            return dict(json.loads(file.read()))
        except (ValueError, TypeError):
            raise CxrayError(f"{file}: is not JSON, or not an object; make the folder again") from None

    def image(self, source: ImageSource) -> Application | None:
        """An encoder to see pictures again by; None where it is the one by which the gateway encodes uploads."""
        key = [source.about["fingerprint"], source.about["grid"], source.dicom, source.tuned and str(source.tuned)]
        bound = self._encoder("image", key, ImageEncoder, source)
        return None if bound is self.first["image"] else bound

    def text(self, source: TextSource) -> Application:
        return self._encoder("text", [source.name, source.fingerprint], TextDeployment, source)

    def deploy(self, name: str, kind: type, scale: Scale, *args: Any) -> Application:
        """`kind(scale, *args)` in each replica; an Application among the args is a handle there."""
        return deployment(name=name, **options(scale))(kind).bind(scale, *args)

    def _encoder(self, side: str, key: list[Any], kind: type, source: Any) -> Application:
        known = json.dumps([side, *key])
        if known not in self._encoders:
            nth = sum(name.startswith(f'["{side}"') for name in self._encoders) + 1
            scale = getattr(self.settings, side)
            self._encoders[known] = self.deploy(side if nth == 1 else f"{side}-{nth}", kind, scale, source)
            self.first.setdefault(side, self._encoders[known])
        return self._encoders[known]


def options(scale: Scale) -> dict[str, Any]:
    """A deployment's settings in Ray Serve's words."""
    some: dict[str, Any] = {"num_replicas": scale.replicas}
    if scale.autoscale is not None:
        auto = scale.autoscale
        some = {"autoscaling_config": {"min_replicas": auto.min, "max_replicas": auto.max, "target_ongoing_requests": auto.target}}
    return some | {
        "ray_actor_options": {"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        "max_ongoing_requests": scale.ongoing,
        "max_queued_requests": scale.queued,
        "health_check_period_s": scale.health_s,
        "health_check_timeout_s": 2 * scale.timeout_s,
        "graceful_shutdown_timeout_s": scale.shutdown_s,
        # A new replica stands before the old one goes, so that a redeploy is never without any.
        "max_surge_percent": 100,
    }
