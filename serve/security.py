"""Who may ask, and how often.

A key is 256 random bits, shown once; the file holds its SHA-256. (Slow hashes protect passwords, which can be guessed; these cannot.)
Rates are counted in each replica of the gateway by itself, in whole minutes: with n replicas a key has up to n times its rate.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import Request, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter
from pydantic import TypeAdapter, ValidationError

from contracts.config import Config
from contracts.errors import CxrayError
from serve.problems import Problem

log = logging.getLogger("cxray.gateway")


class Key(Config):
    name: str
    sha256: str
    created: str


_KEYS = TypeAdapter(list[Key])


def new_key(path: Path, name: str) -> str:
    """A new key, whose hash is added to the file under this name. Raises CxrayError for a name that is taken, or is no name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", name):
        raise CxrayError("a key's name has up to 32 letters, digits, - and _; it stands in the access log, so let it be no person's")
    secret = secrets.token_urlsafe(32)
    with _changed(path) as keys:
        if name in [key.name for key in keys]:
            raise CxrayError(f"{path}: has a key `{name}` already; take another name, or delete its entry first")
        keys.append(Key(name=name, sha256=_hash(secret), created=datetime.now(UTC).isoformat(timespec="seconds")))
    return secret


def drop_key(path: Path, name: str) -> None:
    """From now on the key of this name is none; where there is no such key, nothing happens. Raises CxrayError for a damaged file."""
    with _changed(path) as keys:
        keys[:] = [key for key in keys if key.name != name]


@contextmanager
def _changed(path: Path) -> Iterator[list[Key]]:
    """The file's keys, to be changed, and written where nothing was raised: whole or not at all, for its owner, by one after another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # locked in place of the file, which is another one after each change
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        keys = _read(path) if path.exists() else []
        yield keys
        fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(_KEYS.dump_json(keys, indent=1))
        fresh.replace(path)
    finally:
        os.close(folder)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _read(path: Path) -> list[Key]:
    """Raises CxrayError."""
    try:
        return _KEYS.validate_python(json.loads(path.read_bytes()))
    except (OSError, ValueError, ValidationError):
        raise CxrayError(f"{path}: cannot be read as a file of keys; make one with `cxray key NAME --keys FILE`") from None


class Keys:
    """The file of keys, read again whenever it changed. While it is missing or damaged, nobody is let in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: Any = ()
        self._keys: list[Key] = []

    def name_of(self, secret: str) -> str | None:
        """Whose key this is; it takes the same time whether and wherever it stands in the file."""
        self._refresh()
        given, found = _hash(secret), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, given):
                found = key.name
        return found

    def _refresh(self) -> None:
        try:
            seen = self.path.stat()
            stamp = (seen.st_mtime_ns, seen.st_size, seen.st_ino)
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(self.path)
        except CxrayError as error:
            self._keys = []
            log.error("%s; until then every request is answered 401", error)


class Gate:
    """Keys, their rates, and how much each has under way: no key takes all places, be it with uploads that do not come."""

    def __init__(self, keys: Keys, per_minute: int, at_once: int) -> None:
        self.keys, self.rate, self.at_once = keys, RateLimitItemPerMinute(per_minute), at_once
        self.limiter = FixedWindowRateLimiter(MemoryStorage())
        self._inside: Counter[str] = Counter()

    async def admit(self, secret: str | None) -> str:
        """The key's name; who is let in has to `leave`. Raises Problem 401, the same whatever was wrong, or 429."""
        name = self.keys.name_of(secret) if secret else None
        if name is None:
            detail = "send a key of this service: `Authorization: Bearer KEY` or `X-API-Key: KEY`"
            raise Problem(401, "no_key", detail, headers={"WWW-Authenticate": 'Bearer realm="cxray"'})
        if not await self.limiter.hit(self.rate, name):
            reset = (await self.limiter.get_window_stats(self.rate, name)).reset_time
            detail = f"this key has {self.rate.amount} requests a minute"
            raise Problem(429, "too_many_requests", detail, retry_after=max(1, int(reset - time.time()) + 1))
        if self._inside[name] >= self.at_once:
            raise Problem(429, "too_many_at_once", f"this key may have {self.at_once} requests under way", retry_after=1)
        self._inside[name] += 1
        return name

    def leave(self, name: str) -> None:
        self._inside[name] -= 1
        self._inside = +self._inside


_bearer = HTTPBearer(auto_error=False, scheme_name="Bearer", description="`Authorization: Bearer KEY`")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, scheme_name="Key", description="`X-API-Key: KEY`")


async def admitted(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    header: Annotated[str | None, Security(_header)],
) -> AsyncGenerator[None, None]:
    """What a route depends on to be for those with a key only. It runs before any of the body is read."""
    gate: Gate = request.app.state.gate
    request.state.exchange.key = name = await gate.admit(bearer.credentials if bearer else header)
    try:
        yield
    finally:
        gate.leave(name)
