"""run.json: what a verb was asked to do, on what, with which code, and what came of it. It stands beside every output."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contracts.config import Config, without_resources
from contracts.dataset import Dataset, read_manifest
from contracts.errors import CxrayError
from contracts.storage import Place

RUN = "run.json"
_PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "open_clip_torch",
    "sentence-transformers",
    "pyarrow",
    "duckdb",
    "faiss-cpu",
    "pydicom",
)


def record(place: Place, verb: str, config: Config, inputs: dict[str, Place], summary: dict[str, Any]) -> None:
    """Write run.json into a finished output.

    inputs: the data sets and run folders that were read, by name; their versions are noted, so that `finished` can tell a later
    change. Nothing in it is a secret: configs hold none.
    """
    text = {
        "verb": verb,
        "config": config.model_dump(mode="json"),
        "inputs": {name: {"uri": p.uri, "version": version_of(p)} for name, p in inputs.items()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_revision": code_revision(),
        "versions": versions(),
        "summary": summary,
    }
    (place / RUN).write(json.dumps(text, indent=1, default=str).encode())


def read_run(place: Place) -> dict[str, Any] | None:
    """What run.json says, or None where there is none."""
    try:
        return json.loads((place / RUN).read())
    except CxrayError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def finished(place: Place, verb: str, config: Config, inputs: dict[str, Place]) -> bool:
    """True where `place` holds the finished output of just this: same verb, same settings, inputs unchanged since."""
    run = read_run(place)
    if run is None or run["verb"] != verb:
        return False
    then, now = (without_resources(settings) for settings in (run["config"], config.model_dump(mode="json")))
    return then == now and {n: i["version"] for n, i in run["inputs"].items()} == {n: version_of(p) for n, p in inputs.items()}


def version_of(place: Place) -> str | None:
    """A word that changes when what lies at `place` changes: of a data set its files, of a run folder its last run."""
    manifest = read_manifest(place)
    if manifest is not None:
        return Dataset(place, manifest).version
    run = read_run(place)
    return run["finished"] if run else None


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def code_revision() -> str:
    """The commit of this checkout, '+changes' where files differ from it; CXRAY_REVISION where there is no git (an image)."""
    root = Path(__file__).resolve().parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("CXRAY_REVISION", "unknown")
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
