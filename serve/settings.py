"""What is served, from which run folders, and how much of the cluster it takes. In a YAML of Ray Serve an application's `args`:

http_options: {host: 127.0.0.1, port: 8000, request_timeout_s: 25}  # `serve deploy` would listen to the whole network, and without an end
logging_config: {log_level: WARNING, enable_access_log: false}  # Serve's own lines hold what clients send; the gateway writes safe ones
applications:
  - name: cxray
    import_path: serve.app:app
    args: {out: runs/demo, models: {fusion: {run: fusion}, search: {run: index}}}
"""

from typing import Any, Self

from pydantic import Field, model_validator

from contracts.config import Config
from pipelines.job import VerbConfig


class Autoscale(Config):
    """Replicas come and go with the work. target: requests under way that a replica should have."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=4, ge=1)
    target: float = Field(default=8, gt=0)


class Scale(Config):
    """What a deployment takes of the cluster, and what it bears."""

    replicas: int = Field(default=1, ge=1)
    autoscale: Autoscale | None = None  # instead of a fixed number of replicas
    cpus: float = Field(default=0.1, ge=0)  # a replica's, for placing it; a replica computes with one thread
    gpus: float = Field(default=0, ge=0)
    ongoing: int = Field(default=64, ge=1)  # requests under way in a replica
    queued: int = Field(
        default=256, ge=-1
    )  # requests that wait at each caller for a free replica; those beyond are turned away; -1: no bound
    timeout_s: float = Field(default=15, gt=0)  # a model that has not answered by then will not
    health_s: float = Field(default=10, gt=0)  # how often the model is run to see that it still can
    shutdown_s: float = Field(default=30, gt=0)  # a replica that has to go finishes what it has begun

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.autoscale is not None and "replicas" in self.model_fields_set:
            raise ValueError("set either replicas or autoscale")
        if self.autoscale is not None and self.autoscale.max < self.autoscale.min:
            raise ValueError("autoscale.max is less than autoscale.min")
        return self


class Batched(Scale):
    """A model that takes many requests at once."""

    batch: int = Field(default=16, ge=1)  # requests at most
    wait_s: float = Field(default=0, ge=0)  # how long a batch waits to be filled; while one is computed the next one fills by itself

    @model_validator(mode="after")
    def _can_fill(self) -> Self:
        if self.ongoing < self.batch:
            raise ValueError("ongoing is less than batch, so no batch would ever be full")
        return self


class GatewaySettings(Scale):
    """What the gateway lets in."""

    ongoing: int = Field(default=128, ge=1)
    max_body_bytes: int = Field(default=32 << 20, ge=1)
    max_images: int = Field(default=8, ge=1)  # of one study
    deadline_s: float = Field(default=20, gt=0)  # of a whole request; then 504
    body_s: float = Field(default=10, gt=0)  # by when its body has to be here; then 504
    keys: str = "keys.json"  # the file of the keys' hashes; a name is below `out`, as for run folders
    rate_per_minute: int = Field(default=600, ge=1)  # requests with one key
    ongoing_per_key: int = Field(default=96, ge=1)  # requests of one key under way in a replica: fewer than `ongoing`


class ServeSettings(VerbConfig):
    """The `args` of an application. out: the folder below which run folders lie, as in every config.

    models: by the name of a file in serve/deployments, each with that file's `Settings`.
    The encoders of the first one are those that the gateway encodes uploads and texts by.
    image, text: the encoders' scale; which ones, the models say.
    """

    models: dict[str, dict[str, Any]] = {}
    image: Batched = Batched()
    text: Batched = Batched()
    gateway: GatewaySettings = GatewaySettings()
