"""One job a folder: who holds it keeps it while it lives, and of those that want a dead one's place one gets it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from contracts.errors import CxrayError
from contracts.storage import Place, place
from pipelines import lease
from pipelines.lease import Lease

HOLD = """
import sys
from contracts.storage import place
from pipelines.lease import Lease

Lease(place(sys.argv[1])).take()
print(1, flush=True)
input()
"""
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def file(tmp_path) -> Place:
    return place(tmp_path / "out/_lease")


def holder(file: Place, **other: object) -> None:
    """A lease of somebody else's."""
    file.write(json.dumps({"host": "elsewhere", "pid": 1, "born": 0.0, "token": "theirs", "time": time.time(), **other}).encode())


def made_old(file: Place) -> None:
    file.write(json.dumps(json.loads(file.read()) | {"time": time.time() - 3600}).encode())


def test_while_a_process_lives_its_folder_is_its_own_and_no_longer(file):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(CxrayError, match=rf"another job \(process {other.pid} on {socket.gethostname()}\)"):
            Lease(file).take()
        other.send_signal(signal.SIGSTOP)  # a laptop's lid, a debugger: it will go on
        made_old(file)
        with pytest.raises(CxrayError, match="another job"):
            Lease(file).take()
    finally:
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked after it yet
        with Lease(file):
            pass
        other.wait()
    assert not file.exists()


def test_of_another_host_only_time_tells(file):
    holder(file)
    with pytest.raises(CxrayError, match="another job"):
        Lease(file).take()
    made_old(file)
    with Lease(file) as mine:
        assert json.loads(file.read())["token"] == mine.token


def test_a_process_number_used_again_is_another_process(file):
    holder(file, host=socket.gethostname(), pid=os.getpid())
    with Lease(file):
        pass


def test_of_many_that_replace_a_dead_one_one_does(file):
    holder(file, time=0)
    leases, got = [Lease(file) for _ in range(12)], []

    def start(one: Lease) -> None:
        try:
            one.take()
            got.append(one)
        except CxrayError:
            pass

    threads = [threading.Thread(target=start, args=(one,)) for one in leases]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(got) == 1 and json.loads(file.read())["token"] == got[0].token
    got[0].release()


def test_whoever_was_taken_for_dead_stops_and_leaves_the_others_alone(file):
    mine = Lease(file)
    mine.take()
    holder(file)
    theirs = file.read()
    with pytest.raises(CxrayError, match="no longer this job's"):
        mine.renew()
    mine.release()
    assert file.read() == theirs


def test_a_file_that_says_nothing_is_not_nobodys(file):
    file.write(b"")
    with pytest.raises(CxrayError, match="delete it if nobody does"):
        Lease(file).take()


def test_a_busy_store_does_not_stop_the_heart(file, monkeypatch):
    calls, beaten, swap = [], threading.Event(), Place.swap

    def busy(self: Place, old: bytes | None, new: bytes | None) -> bool:
        calls.append(new)
        if 1 < len(calls) < 4:
            raise CxrayError("the store is busy (503)") if len(calls) == 2 else OSError("something else")
        done = swap(self, old, new)
        if len(calls) >= 4:
            beaten.set()
        return done

    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(Place, "swap", busy)
    with Lease(file):
        assert beaten.wait(10), "it was not renewed again"
    assert not file.exists()
