"""One way to open a URI: a local path, gs://, or anything fsspec knows.

A `Place` is a URI and the options to open it with, and nothing else: it is what crosses processes. Clients and credentials are
made where they are used (application-default credentials for Google), and never leave it.
"""

import contextlib
import errno
import logging
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.fs
from filelock import FileLock

from contracts.config import Config
from contracts.errors import CxrayError, RowError

# gcsfs asks over gRPC which kind a bucket is before its first read: minutes of silence against an emulator, and
# nothing that we use on PhysioNet's buckets. It has to be said before gcsfs is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# It also logs, with a traceback, what it raises; raised is enough.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

# What Ray retries by itself when it reads or writes Parquet, besides S3's own: Google's words for 'try again' (regular expressions).
PASSING = (r"\b429\b", r"\b50[0234]\b", r"(?i)connection reset", r"(?i)timed? ?out", r"(?i)too many requests")


class StorageOptions(Config):
    """How gs:// URIs are opened; other schemes take nothing from here."""

    billing_project: str | None = None  # whom requester-pays buckets charge
    anonymous: bool = False  # no credentials: public buckets and emulators
    endpoint_url: str | None = None  # another server that speaks Google's API
    timeout_s: float = 30.0  # a store that is silent for so long is asked again, and after six times given up


@dataclass(frozen=True)
class Place:
    """A file or a folder somewhere. `Place / 'name'` is what lies in it."""

    uri: str
    options: StorageOptions = field(default_factory=StorageOptions)

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.uri.rstrip('/')}/{name.strip('/')}", self.options)

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def scheme(self) -> str:
        return self.uri.partition("://")[0] if "://" in self.uri else "file"

    @property
    def local(self) -> Path | None:
        """The path, where the place is on this machine's disk."""
        return Path(self.path) if self.scheme == "file" else None

    @property
    def store(self) -> "Place":
        """The bucket, or the topmost folder: what may be said of a row's own file, whose path names its patient."""
        if self.scheme == "file":
            return Place(str(Path(*Path(self.path).parts[:2])), self.options)
        return Place(f"{self.scheme}://{self.path.partition('/')[0]}", self.options)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system, opened in this process (fsspec keeps one an address)."""
        o, options = self.options, {}
        if self.scheme in ("gs", "gcs"):
            import aiohttp  # here, so that a local run need not wait for it

            options = {
                # Named, because gcsfs by itself would go on as nobody where there are no credentials; and without a project, because it
                # would refuse credentials of another one than the one that pays.
                "token": "anon" if o.anonymous else "google_default",
                "project": "",
                "requester_pays": o.billing_project or False,
                "endpoint_url": o.endpoint_url,
                # Of silence, not of the whole request: a big file may take its time.
                "requests_timeout": aiohttp.ClientTimeout(sock_connect=o.timeout_s, sock_read=o.timeout_s),
                # A listing kept from before another process wrote is a wrong listing.
                "use_listings_cache": False,
            }
        with told(self.store):
            return fsspec.filesystem(self.scheme, **options)

    @property
    def path(self) -> str:
        """The path as the file system names it, without the scheme."""
        if self.scheme == "file":
            return str(Path(self.uri.removeprefix("file://")).expanduser().absolute())
        return self.uri.partition("://")[2].rstrip("/")

    def arrow(self) -> tuple[pyarrow.fs.FileSystem, str]:
        """(pyarrow file system, path). Pickled, it carries these options and no client."""
        if self.scheme == "file":
            return pyarrow.fs.LocalFileSystem(), self.path
        return pyarrow.fs.PyFileSystem(_Handler(self.fs)), self.path

    def exists(self) -> bool:
        with told(self):
            return self.fs.exists(self.path)

    def size(self) -> int:
        with told(self):
            return int(self.fs.size(self.path) or 0)

    def read(self) -> bytes:
        with told(self):
            return bytes(self.fs.cat_file(self.path))  # pyright: ignore[reportArgumentType]

    def read_text(self) -> str:
        return self.read().decode("utf-8")

    def write(self, data: bytes) -> None:
        """Write a whole file or none: a reader never sees a half of it."""
        with told(self):
            if self.local is None:
                self.fs.pipe_file(self.path, data)  # an object appears when it is complete
                return
            self.local.parent.mkdir(parents=True, exist_ok=True)
            part = self.local.with_name(f".{self.local.name}.{uuid.uuid4().hex[:8]}")
            try:
                part.write_bytes(data)
                part.replace(self.local)
            finally:
                part.unlink(missing_ok=True)

    def swap(self, old: bytes | None, new: bytes | None) -> bool:
        """Put `new` where just `old` stands (None: no file), and say whether it did. Of two that try at once one does: on Google's store
        by its own word, on a disk by a lock beside the file, and elsewhere only as a rule."""
        with told(self):
            if self.scheme in ("gs", "gcs"):
                return _swap_object(self.fs, self.path, old, new)
            with self._lock():
                try:
                    there = self.fs.cat_file(self.path)
                except FileNotFoundError:
                    there = None
                if there != old:
                    return False
                if new is None:
                    self.remove()
                else:
                    self.write(new)
                return True

    def _lock(self) -> contextlib.AbstractContextManager[Any]:
        if self.local is None:
            return contextlib.nullcontext()
        self.local.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.local.with_name(f".{self.local.name}.lock"), timeout=self.options.timeout_s)

    def files(self, ending: str = "", depth: int | None = None) -> list["Place"]:
        """All files below this folder whose name ends so, by name; none where the folder is not there. depth: 1 for just its own."""
        with told(self):
            try:
                found = self.fs.find(self.path, maxdepth=depth)
            except FileNotFoundError:
                return []
        prefix = "" if self.scheme == "file" else f"{self.scheme}://"
        return [Place(prefix + str(p), self.options) for p in sorted(found) if str(p).endswith(ending)]

    def relative(self, to: "Place") -> str:
        """This place's path below `to`."""
        return self.path.removeprefix(to.path).lstrip("/")

    def remove(self) -> None:
        """Delete the file, or the folder and all that is in it; nothing happens where there is nothing."""
        with told(self), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path, recursive=True)


def _swap_object(fs: Any, path: str, old: bytes | None, new: bytes | None) -> bool:
    """`Place.swap` in a bucket: Google does it where the object's generation is still the one that was read."""
    try:
        generation = "0" if old is None else fs.info(path)["generation"]
        if old is not None and fs.cat_file(path, generation=generation) != old:
            return False
        bucket, name, _ = fs.split_path(path)
        if new is None:
            fs.call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=generation)
            return True
        where = fs.base.replace("/storage/", "/upload/storage/", 1) + "b/{}/o"  # gcsfs knows only the generation 0, which is none
        fs.call("POST", where, bucket, uploadType="media", name=name, ifGenerationMatch=generation, data=new)
    except (FileNotFoundError, FileExistsError):  # its answers 404 and 412
        return False
    return True


class _Handler(pyarrow.fs.FSSpecHandler):
    """pyarrow's way into fsspec, mended where a bucket is no disk."""

    def create_dir(self, path: str, recursive: bool) -> None:
        """A bucket has no folders; asked for one, gcsfs would look for the bucket, and make it where it may not look."""
        if "gs" not in self.fs.protocol:
            super().create_dir(path, recursive)

    def move(self, src: str, dest: str) -> None:
        """Google renames in one step; an emulator does not know how, and gcsfs would ask it six times before it copies."""
        if "gs" in self.fs.protocol and not self.fs.on_google:
            self.fs.cp_file(src, dest)
            self.fs.rm_file(src)
        else:
            super().move(src, dest)

    def open_input_file(self, path: str) -> pyarrow.PythonFile:
        """pyarrow asks first whether it is a file, and takes any failure (503, 403) for 'no such file'."""
        # Of gcsfs' ways to read ahead the plain one: by default it fetches what a reader of Parquet, which jumps, never asks for.
        options = {"cache_type": "readahead"} if "gs" in self.fs.protocol else {}
        return pyarrow.PythonFile(self.fs.open(path, "rb", **options), mode="r")

    open_input_stream = open_input_file


@contextlib.contextmanager
def told(place: Place) -> Iterator[None]:
    """Turn what a store answers into a sentence for a person."""
    try:
        yield
    except CxrayError:
        raise
    except Exception as error:
        sentence = meaning(error)
        if sentence is None:
            raise
        raise CxrayError(f"{place.uri}: {sentence}") from error


@contextlib.contextmanager
def told_of_row(place: Place) -> Iterator[None]:
    """The same for a row's own file: one that is not there is a lasting reject, a store that is busy or away, and a disk that cannot
    read it now, a passing one.

    A refusal (400, 401, 403) is of the whole bucket and stays an error of the whole job, or every row would be a reject.
    """
    with told(place.store):
        try:
            yield
        except FileNotFoundError:
            raise RowError("missing_file") from None
        except IsADirectoryError:
            raise RowError("not_a_file") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _OF_ONE_FILE:
                raise RowError("unreadable_file", lasting=False) from None
            status = _status(error)
            if not _busy(status) and not _silent(error):
                raise
            raise RowError(f"store_{status or 'unreachable'}", lasting=False) from None


# What a disk says of one file of many: a bad block, a server that forgot it, a path that leads through a file or nowhere.
_OF_ONE_FILE = (errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind what gcsfs, fsspec or aiohttp raise, where there is one."""
    for name in ("code", "status", "status_code"):
        value = getattr(error, name, None)
        if str(value).isdigit():
            return int(str(value))
    text = str(error)
    if text.startswith("Forbidden:"):  # an OSError of gcsfs
        return 403
    if text.startswith(("Bad Request:", "Bucket is requester pays")):  # its ValueErrors
        return 400
    return 502 if type(error).__name__ == "ProxyError" else None  # all that gcsfs leaves of a 502


def _busy(status: int | None) -> bool:
    return status in (408, 429) or (status is not None and status >= 500)


def _silent(error: BaseException) -> bool:
    """True where no answer came: refused, reset, timed out, no network."""
    kind = f"{type(error).__module__}.{type(error).__name__}"
    network = kind.startswith(("aiohttp.", "requests.")) or kind == "google.auth.exceptions.TransportError"
    return network or isinstance(error, TimeoutError | ConnectionError)


def of_a_store(error: BaseException) -> bool:
    """True where an exception is a store's, or a full disk's, whoever met it: not a file that is not there or a connection that broke,
    which may be anybody's."""
    kind = type(error).__module__
    if kind in ("builtins", "requests.exceptions"):  # which gcsfs raises too
        return _status(error) is not None or getattr(error, "errno", None) == errno.ENOSPC
    return kind.startswith(("gcsfs.", "aiohttp.", "google.auth."))


def meaning(error: BaseException) -> str | None:
    """What an exception of a store or a disk means to a person; None for what is no fault of theirs."""
    kind, text, status = f"{type(error).__module__}.{type(error).__name__}", str(error), _status(error)
    if status == 400 and re.search(r"user project specified|unknown project", text, re.I):
        return "Google does not know the project that is to pay (400): correct storage.billing_project or CXRAY_BILLING_PROJECT"
    if status == 400 and re.search(r"user project|requester pays", text, re.I):
        return "the bucket charges its readers (400, no user project): set storage.billing_project or CXRAY_BILLING_PROJECT"
    if status == 400:
        return "the store did not understand the request (400): is the bucket's name right?"
    if status == 401:
        return "the store does not know these credentials (401): run `gcloud auth application-default login`, or unset storage.anonymous"
    if status == 403 and "serviceusage" in text:
        return "these credentials may not charge the billing project (403): name another in storage.billing_project, or ask its owner"
    if status == 403:
        return "no access with these credentials (403): PhysioNet grants a bucket to one Google account, once its agreement is signed"
    if _busy(status):
        return f"the store is busy ({status}): run the same command again"
    if isinstance(error, FileNotFoundError):
        return "is not there (404): check the path, and the version that PhysioNet puts into a bucket's name"
    if _silent(error):
        return "the store does not answer: check the network and the address, then run the same command again"
    if kind.startswith("google.auth."):
        return "no Google credentials here: run `gcloud auth application-default login`, or set storage.anonymous for a public bucket"
    if isinstance(error, ImportError) or text.startswith("Protocol not known"):
        return f"cannot be opened: {text}"
    if isinstance(error, PermissionError):
        return "may not be read or written by this user: change its permissions, or name another place"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk: make room, then run the same command again"
    return None


def place(uri: str | os.PathLike[Any], options: StorageOptions | None = None) -> Place:
    """A place; without options those of the environment (CXRAY_BILLING_PROJECT)."""
    return Place(str(uri), options or StorageOptions(billing_project=os.environ.get("CXRAY_BILLING_PROJECT")))
