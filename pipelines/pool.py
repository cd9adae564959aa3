"""How many encoder actors, and what each may take. On a GPU cluster one a GPU; on CPUs one a core, of one thread each; of few rows fewer.

One thread each: two threads of one encoder wait for each other wherever a reader takes a core from under them (benchmarks/images.py).
Of each node's CPUs one and a half are left over for reading, writing and, at a resume, for Ray's checkpoint filter, which wants a
whole one. Encoders ask for half of the rest only: where a node is lost its encoders start again on those that are left, and there must
be as much left over then. What they ask for decides where they are put, not what they use.
"""

import ctypes
import os
from typing import Any

from contracts.config import Config
from contracts.errors import CxrayError

LEFT_OVER = 1.5  # CPUs
WORTH = 64  # rows; with fewer for each, one encoder is done with them sooner than another has started, which takes its CPU for 5 to 8 s

# A block of rows is tried so often again whose process was killed: by a row that crashes it, for memory, or with its node. Ray would try
# for ever. Nodes that say that they go (spot machines with a notice) do not count, and six others lost under one block are no accident.
# A block in an actor has no number of its own: Ray would count each call that finds no actor there, and a node that is lost without a
# notice is one for so long (github.com/ray-project/ray/issues/25457). There the actor's own deaths are counted, of whatever block.
RETRIES = 5
RESTARTS = 20


class EncoderResources(Config):
    batch: int | None = None  # rows an encoder call; by default 64 on a GPU, 16 on a CPU, whose cache a larger one leaves
    actors: int | None = None  # at most so many; by default from the cluster's size
    gpus: float | None = None  # a share of a GPU each; by default 1 where the cluster has GPUs, else 0


def joined() -> bool:
    """Whether Ray is another's, that was there before. It may grow, and its workers are none of this process's."""
    return os.environ.get("RAY_ADDRESS", "local") != "local"


def encoder_pool(resources: EncoderResources, rows: int) -> dict[str, Any]:
    """Keyword arguments of `map_batches` for a pool of encoder actors. Raises CxrayError where none of them could ever start.

    rows: to encode in all.
    """
    import ray
    from ray.data import ActorPoolStrategy

    have, nodes = ray.cluster_resources(), [n["Resources"] for n in ray.nodes() if n["Alive"]]
    cpus, gpus = have.get("CPU", 1), resources.gpus if resources.gpus is not None else float(have.get("GPU", 0) > 0)
    if gpus > (there := max(n.get("GPU", 0) for n in nodes)) and not joined():  # a cluster may grow; there `Watch` says what is waited for
        raise CxrayError(
            f"resources.gpus: an encoder is to have {gpus:g} GPUs, and this machine has {there:g}: "
            "leave it out to take what is there, or name a cluster in RAY_ADDRESS"
        )
    # What is left over has to lie on one node: half a CPU on each of two runs nothing that wants a whole one.
    smallest = min((n["CPU"] for n in nodes if n.get("CPU")), default=1)
    most = max(1, int(have.get("GPU", 0) / gpus if gpus else cpus))
    if resources.actors:  # more than one a core would take what is left over for reading and writing
        most = resources.actors if gpus else min(resources.actors, most)
    most = min(most, max(1, rows // WORTH))
    return {
        # GPUs may come and go; on CPUs an actor that starts late takes its start-up from those at work.
        "compute": ActorPoolStrategy(min_size=1 if gpus else most, max_size=most),
        "num_cpus": 1 if gpus else max(0.05, round((smallest - LEFT_OVER) / smallest / 2, 2)),
        "num_gpus": gpus,
        "batch_size": resources.batch or (64 if gpus else 16),
        "batch_format": "pyarrow",
        "max_task_retries": -1,
        "max_restarts": RESTARTS,
    }


def one_thread_on_cpu() -> None:
    """Called in an encoder's actor before it loads: the pool has an actor for each core."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_memory() -> None:
    """Called in a worker that takes and frees the same tens of megabytes again and again: what it frees it keeps, up to 256 MB. By itself
    glibc gives it back, and the system hands it out anew, cleared, page by page: of training on CPUs that was a tenth of the
    time. What is larger than 32 MB is given back as before. Where the C library is another, nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)
