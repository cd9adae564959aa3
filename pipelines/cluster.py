"""The Ray that all work runs on: the cluster that RAY_ADDRESS names, or one of this machine's own; and what its errors say to a person."""

import logging
import os
import secrets
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from contracts.errors import CxrayError, causes, sentence
from contracts.storage import Place, meaning, of_a_store
from pipelines.pool import RETRIES

HEAD_ANSWERS_S = 10.0  # within which a cluster's head accepts a connection


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine. Never somebody else's by accident.

    Raises CxrayError where there is no such cluster, or Ray does not start.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # what is killed for memory Ray counts by itself, and would try for ever
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        _start_here()
    else:
        _join(address)
    import ray.data

    from pipelines.watch import Watch

    ray.data.DataContext.get_current().custom_execution_callback_classes = [Watch]
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the job says itself how it goes, and what stops it is raised
    # Ray 2.60 has a named parameter for all but how often something is tried again.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", DeprecationWarning)


def _start_here() -> None:
    """Ray's ports are open to the network, and it runs what reaches them. This one lets in who knows its token: a new one, unless the
    environment names another, and in no file, where Ray itself would leave one for whoever may read the home folder."""
    import ray

    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ lines go to the log files, not between ours
    # Of idle workers more than one a core Ray ends those that were idle for a second, and starts others for the next blocks, for two
    # seconds of a core each: of reading and writing at a quarter of a core that was a third of the time (benchmarks/images.py).
    os.environ.setdefault("RAY_num_workers_soft_limit", str(4 * (os.cpu_count() or 1)))
    if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # Ray turns tokens on by itself where nothing says otherwise
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # a bare one is what Ray raises where one of its own processes ended meanwhile
        said = " ".join(str(error).split())
        raise CxrayError(f"Ray did not start on this machine ({said}): has it memory and disk left? Try again") from error


def _join(address: str) -> None:
    import ray

    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself waits nine minutes for one that is not there, and says nothing
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_ANSWERS_S).close()
        ray.init(address=address, log_to_driver=False)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise CxrayError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({said}); correct it, or unset it") from error


@contextmanager
def plainly(out: Place) -> Iterator[None]:
    """Say in a line what stopped a worker, where it is the user's to put right; a fault of the program keeps its traceback."""
    try:
        yield
    except Exception as error:
        from ray.exceptions import LocalRayletDiedError

        if said := sentence(error):
            raise CxrayError(said) from error
        if said := next(filter(None, map(meaning, filter(of_a_store, causes(error)))), None):
            raise CxrayError(f"{out}: {said}") from error
        if any(isinstance(cause, LocalRayletDiedError) for cause in causes(error)):
            raise CxrayError(
                "Ray ended on this machine, by a signal or because the machine had no memory left: the same command goes on from here"
            ) from error
        raise
