"""Configs: strict, layered, overridable, and said to a person when they are wrong."""

import pytest

from contracts.config import Config, load
from contracts.errors import CxrayError
from contracts.storage import StorageOptions
from pipelines.cohort.job import CohortConfig


class Inner(Config):
    rate: float = 0.5
    resources: dict[str, float] = {}


class Outer(Config):
    outside_fingerprint = frozenset({"workers"})
    name: str = "a"
    root: str | None = None
    out: str = "runs"
    workers: int = 1
    inner: Inner = Inner()
    storage: StorageOptions = StorageOptions()


def write(path, text):
    path.write_text(text)
    return path


def test_extends_lays_a_file_over_others_and_set_over_all(tmp_path):
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "b.yaml", "name: base\nworkers: 2\ninner: {rate: 0.1}\n")
    top = write(tmp_path / "top.yaml", "extends: base/b.yaml\nworkers: 3\n")
    config = load(Outer, top, ["inner.rate=0.9", "name=null-like"])
    assert (config.name, config.workers, config.inner.rate) == ("null-like", 3, 0.9)


def test_a_config_that_extends_itself_is_an_error(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml")
    write(tmp_path / "b.yaml", "extends: a.yaml")
    with pytest.raises(CxrayError, match="extends itself"):
        load(Outer, tmp_path / "a.yaml")


def test_an_unknown_key_names_the_nearest_known_one():
    with pytest.raises(CxrayError, match=r"unknown key `inner\.rte`: did you mean `rate`\?"):
        load(Outer, {"inner": {"rte": 1}})
    with pytest.raises(CxrayError, match=r"unknown key `sources\.cxrr`: did you mean `cxr`\?"):
        load(CohortConfig, {"sources": {"cxrr": "x"}})


def test_a_wrong_value_is_named_and_not_repeated():
    with pytest.raises(CxrayError, match="`workers`: ") as error:
        load(Outer, {"workers": "secret-token"})
    assert "secret-token" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "- a list", "\x00"])
def test_a_file_that_is_no_config_is_one_sentence(tmp_path, text):
    with pytest.raises(CxrayError):
        load(Outer, write(tmp_path / "x.yaml", text))
    with pytest.raises(CxrayError, match="No such file"):
        load(Outer, tmp_path / "none.yaml")


@pytest.mark.parametrize("item", ["novalue", "=1", "a=["])
def test_a_malformed_override_is_one_sentence(item):
    with pytest.raises(CxrayError, match="--set"):
        load(Outer, {}, [item])


def test_the_environment_fills_in_only_what_no_file_says(monkeypatch):
    monkeypatch.setenv("CXRAY_ROOT", "gs://env")
    monkeypatch.setenv("CXRAY_BILLING_PROJECT", "payer")
    assert load(Outer, {}).root == "gs://env"
    assert load(Outer, {}).storage.billing_project == "payer"
    assert load(Outer, {"root": "/mine"}).root == "/mine"


def test_shared_settings_of_a_chain_reach_the_configs_that_have_them():
    assert load(Outer, {"out": "x"}, shared={"out": "y", "else": 1}).out == "y"


def test_the_fingerprint_sees_what_decides_rows_and_nothing_else():
    base = Outer().fingerprint()
    assert Outer(workers=9).fingerprint() == base
    assert Outer(name="b").fingerprint() != base
    assert Outer().fingerprint("input") != base
    assert Outer(inner=Inner(resources={"cpus": 2})).fingerprint() == base, "resources stand outside it, however deep"
    assert Outer(inner=Inner(rate=0.6)).fingerprint() != base
