"""Who works on a folder: a file in it that says so, renewed while they do.

A process of this host holds what it took for as long as it runs, were it only suspended; of another host only time tells. Whoever finds
that another has taken over meanwhile stops: it renews, and removes, its own file alone.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any

import psutil

from contracts.errors import CxrayError
from contracts.storage import Place

LEASE_SECONDS = 60.0  # what another host has not renewed for so long is nobody's
BEAT_SECONDS = 10.0


class Lease:
    """As a context, or from `take` to `release`, a folder is this job's alone."""

    def __init__(self, file: Place) -> None:
        self.file, self.token = file, uuid.uuid4().hex
        self._who = {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time(), "token": self.token}
        self._stop = threading.Event()

    def __enter__(self) -> "Lease":
        self.take()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def take(self) -> None:
        """Raises CxrayError where somebody else holds it."""
        there = None
        while not self.file.swap(there, self._text()):  # of two that find nobody's, one makes it its own
            there, holder = self._there()
            if there is None or _gone(holder):
                continue
            if holder.get("token") == self.token:  # ours: the store's answer was lost, and its client asked again
                break
            raise CxrayError(
                f"{self.file}: another job (process {holder['pid']} on {holder['host']}) works on this folder; "
                f"wait for it, or for {LEASE_SECONDS:.0f} s after it died"
            )
        self._stop.clear()
        threading.Thread(target=self._beat, daemon=True, name="lease").start()

    def renew(self) -> None:
        """Raises CxrayError where it is no longer ours: to be asked before anything that nobody else may do meanwhile."""
        while True:
            there, holder = self._there()
            if there is None or holder.get("token") != self.token:
                raise CxrayError(
                    f"{self.file}: no longer this job's: another took the folder over while this one stood still, or the file was "
                    "deleted; nothing was published, so run the same command again when no other works here"
                )
            if self.file.swap(there, self._text()):
                return

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(CxrayError, OSError):  # out of reach: then it ages
            there, holder = self._there()
            while holder.get("token") == self.token and not self.file.swap(there, None):
                there, holder = self._there()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # whatever a store or a disk says now may pass by the next beat; what lasts, `renew` says
                self.renew()

    def _text(self) -> bytes:
        return json.dumps({**self._who, "time": time.time()}).encode()

    def _there(self) -> tuple[bytes | None, dict[str, Any]]:
        """The file as it is, and whose it is; None where there is none."""
        try:
            there = self.file.read()
        except CxrayError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None, {}
            raise
        try:
            return there, json.loads(there)
        except json.JSONDecodeError:
            raise CxrayError(f"{self.file}: does not say who works on this folder; delete it if nobody does") from None


def _gone(holder: dict[str, Any]) -> bool:
    """True where the holder runs no more; of another host's all that can be known is that it was silent for long."""
    if holder["host"] != socket.gethostname():
        return time.time() - holder["time"] > LEASE_SECONDS
    try:
        process = psutil.Process(holder["pid"])
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - holder["born"]) > 1  # its number is another's now
    except psutil.NoSuchProcess:
        return True
