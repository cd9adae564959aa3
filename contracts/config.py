"""One YAML a run -> one strict pydantic model.

    extends: ../sources.yaml       another file, or a list of them, laid under this one
    out: runs/demo                 the folder (or URI) that everything this project writes lies below

`--set a.b=c` overrides (the value is YAML). The environment fills in only what no file says: CXRAY_ROOT, CXRAY_OUT and
CXRAY_BILLING_PROJECT. A secret never belongs in a config.
"""

import difflib
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from contracts.errors import CxrayError

FROM_ENVIRONMENT = {
    ("root",): "CXRAY_ROOT",
    ("out",): "CXRAY_OUT",
    ("storage", "billing_project"): "CXRAY_BILLING_PROJECT",
}


class Config(BaseModel):
    """A strict, frozen group of settings: an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # Settings that decide where, how fast or how much, but not what a row holds.
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset()

    def fingerprint(self, *parts: str) -> str:
        """sha256 over what decides the content of the output: these settings, and `parts` (what the inputs were made by)."""
        settings = without_resources(self.model_dump(mode="json", exclude=set(self.outside_fingerprint)))
        text = json.dumps([type(self).__name__, settings, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def without_resources(settings: Any) -> Any:
    """Settings without what says where and how fast, wherever it stands in them."""
    if not isinstance(settings, dict):
        return settings
    return {k: without_resources(v) for k, v in settings.items() if k != "resources"}


C = TypeVar("C", bound=Config)


def load(kind: type[C], source: Path | str | Mapping[str, Any], sets: Sequence[str] = (), shared: Any = None) -> C:
    """Read a config of `kind` from a YAML file or a mapping.

    sets: 'a.b=c' overrides. shared: settings of a chain, laid over the file's own where `kind` has such a field.
    Raises CxrayError for a missing or malformed file and for every setting that does not fit, all in one message.
    """
    where = "the config" if isinstance(source, Mapping) else str(source)
    values = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    values = merge(values, {k: v for k, v in (shared or {}).items() if k in kind.model_fields})
    for item in sets:
        values = merge(values, parse_set(item))
    for path, variable in FROM_ENVIRONMENT.items():
        if path[0] in kind.model_fields and (value := os.environ.get(variable)):
            values = merge(nested(path, value), values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise CxrayError(f"{where}: " + "; ".join(_sentence(kind, e) for e in error.errors())) from None


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, over those it `extends` (whose paths are relative to it)."""
    path = path.resolve()
    if path in seen:
        raise CxrayError(f"{path}: extends itself, through {' -> '.join(p.name for p in (*seen, path))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CxrayError(f"config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CxrayError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise CxrayError(f"config {path} must hold `key: value` lines, not a {type(values).__name__}")
    bases = values.pop("extends", [])
    under: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        under = merge(under, read_yaml(path.parent / base, (*seen, path)))
    return merge(under, values)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `under`, mapping by mapping; anything else is replaced whole."""
    both = dict(under)
    for key, value in over.items():
        old = both.get(key)
        both[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def parse_set(item: str) -> dict[str, Any]:
    """'a.b=3' -> {'a': {'b': 3}}; the value is YAML."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise CxrayError(f"--set {item!r}: write it as key=value, for example --set limit=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise CxrayError(f"--set {item!r}: the value is not YAML; quote it") from None
    return nested(tuple(key.strip().split(".")), value)


def nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """(('a', 'b'), 3) -> {'a': {'b': 3}}."""
    for key in reversed(path):
        value = {key: value}
    return value


def _sentence(kind: type[BaseModel], error: Any) -> str:
    """One pydantic complaint, said to a person. Values are not repeated: a config may hold what is not for a log."""
    path = [str(part) for part in error["loc"]]
    name = ".".join(path) or "config"
    if error["type"] == "extra_forbidden":
        known = _fields(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key `{name}`: {hint}"
    if error["type"] == "missing":
        return f"`{name}` is missing"
    return f"`{name}`: {error['msg'].removeprefix('Value error, ')}"


def _fields(kind: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the settings at `path` below `kind`."""
    for part in path:
        field = kind.model_fields.get(part)
        inner = _model_in(field.annotation) if field else None
        if inner is not None:
            kind = inner
    return list(kind.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return next((m for a in typing.get_args(annotation) if (m := _model_in(a))), None)
    return None
