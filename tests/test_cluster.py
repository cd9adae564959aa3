"""Ray joined, started, or gone: each is said in a line."""

import re
import socket

import pytest
import ray
import ray.exceptions

from contracts.errors import CxrayError
from contracts.storage import place
from pipelines.cluster import connect, plainly


@pytest.mark.parametrize("form", ["nonsense", "127.0.0.1:{}", "[::ffff:127.0.0.1]:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_no_cluster_is_is_said_at_once(monkeypatch, form):
    """Ray itself would wait nine minutes for a head that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = form.format(closed.getsockname()[1])
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(CxrayError, match=rf"^RAY_ADDRESS={re.escape(address)}: no Ray cluster answers there \(.+\); correct it"):
        connect()


def test_a_ray_that_does_not_start_is_said_in_a_sentence(monkeypatch):
    def ended(**_):
        raise Exception("The current node timed out during startup.\nThe raylet failed.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", ended)
    with pytest.raises(CxrayError, match=r"^Ray did not start on this machine \(The current node.*failed\.\): .*Try again$"):
        connect()


def test_what_a_worker_misses_is_not_blamed_on_the_store(tmp_path):
    for error in (FileNotFoundError(2, "No such file", "vocab.txt"), ConnectionError("a service of its own")):
        with pytest.raises(type(error)), plainly(place(tmp_path)):
            raise error
    with pytest.raises(CxrayError, match="no space left"), plainly(place(tmp_path)):
        raise OSError(28, "No space left on device")


def test_rays_own_death_is_said_in_a_sentence(tmp_path):
    with pytest.raises(CxrayError, match=r"^Ray ended on this machine.*the same command goes on") as said, plainly(place(tmp_path)):
        raise ray.exceptions.LocalRayletDiedError
    assert "\n" not in str(said.value)
