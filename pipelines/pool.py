"""How many encoder actors, and what each may take. On a GPU cluster one a GPU; on CPUs one for every two cores.

At two CPUs something must be left for reading, writing and, at a resume, for Ray's checkpoint filter, which wants a whole one.
"""

from typing import Any

from contracts.config import Config


class EncoderResources(Config):
    batch: int = 64  # rows an encoder call
    actors: int | None = None  # at most so many; by default from the cluster's size
    gpus: float | None = None  # a share of a GPU each; by default 1 where the cluster has GPUs, else 0


def encoder_pool(resources: EncoderResources) -> dict[str, Any]:
    """Keyword arguments of `map_batches` for a pool of encoder actors."""
    import ray
    from ray.data import ActorPoolStrategy

    have = ray.cluster_resources()
    gpus = resources.gpus if resources.gpus is not None else float(have.get("GPU", 0) > 0)
    most = resources.actors or max(1, int(have.get("GPU", 0) / gpus) if gpus else int(have.get("CPU", 1)) // 2)
    return {
        "compute": ActorPoolStrategy(min_size=1, max_size=most),
        "num_cpus": 1 if gpus else 0.5,
        "num_gpus": gpus,
        "batch_size": resources.batch,
        "batch_format": "pyarrow",
    }


def torch_threads(resources: EncoderResources) -> int:
    """Threads for one encoder on CPUs: the cores shared by the actors."""
    import os

    return max(1, (os.cpu_count() or 1) // max(1, resources.actors or (os.cpu_count() or 1) // 2))
