"""`cxray serve` and `serve deploy` take one YAML; what is wrong in it is said before anything starts."""

# ruff: noqa: F811 - fixtures that come from another file are arguments here

import json
import socket
from contextlib import closing, nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from served import config, run, settings  # noqa: F401 - a fixture among them
from test_predict import out  # noqa: F401 - a fixture

from contracts.config import load as read
from contracts.errors import CxrayError
from serve import app
from serve import run as command
from serve.security import Keys

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file", ["demo", "mimic"])
def test_the_configs_are_of_serve_deploys_own_format(file):
    served = command.read(ROOT / f"configs/{file}/serve.yaml")
    assert (served.http["host"], served.name, served.prefix) == ("127.0.0.1", "cxray", "/")
    assert not served.logging.enable_access_log
    for model, values in served.settings.models.items():
        read(import_module(f"serve.deployments.{model}").Settings, values)


def test_serve_build_writes_what_serve_deploy_reads(out, run, tmp_path, monkeypatch):
    from ray.serve.schema import ServeDeploySchema
    from ray.serve.scripts import build

    def built() -> list[str]:
        said = CliRunner().invoke(build, ["serve.app:built", "-o", str(tmp_path / "built.yaml")])
        assert said.exit_code == 0, said.output
        one = ServeDeploySchema.model_validate(yaml.safe_load((tmp_path / "built.yaml").read_text())).applications[0]
        return sorted(d.name for d in one.deployments)

    monkeypatch.delenv("CXRAY_SERVE", raising=False)
    assert built() == ["gateway"]
    monkeypatch.setenv("CXRAY_SERVE", str(config(tmp_path / "serve.yaml", settings(out))))
    assert built() == ["fusion", "gateway", "image", "search", "text"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"models": {"fuzion": {}}}, "models.fuzion: no such model; there are examples, fusion, search"),
        ({"models": {"fusion": {"run": "nowhere"}}}, "no model here; name the folder of a finished `cxray train`"),
        ({"models": {"fusion": {"rnu": "fusion"}}}, "unknown key `rnu`: did you mean `run`"),
        ({"models": {"fusion": {"run": "knowledge"}}}, "holds a model of the task None"),
        ({"models": {"fusion": {"evaluation": "cohort"}}}, "no evaluation here"),
        ({"models": {"search": {"run": "nowhere"}}}, "no index here"),
        ({"models": {"search": {"run": "fusion"}}}, "holds no index"),
        ({"models": {"search": {"images": "cohort"}}}, "holds cohort, where images is wanted"),
        ({"models": {"examples": {"images": "nowhere"}}}, "no finished images here"),
        ({"gateway": {"deadline": 3}}, "unknown key `gateway.deadline`: did you mean `deadline_s`"),
        ({"image": {"replicas": 2, "autoscale": {}}}, "set either replicas or autoscale"),
        ({"image": {"batch": 99}}, "ongoing is less than batch"),
        ({"gateway": {"keys": "gs://bucket/keys.json"}}, "gateway.keys: name a file on the gateway's machine"),
    ],
)
def test_settings_that_do_not_fit_are_said_before_anything_starts(out, run, args, sentence):
    with pytest.raises(CxrayError, match=sentence):
        app.app({"out": str(out), **args})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"http_options": {"request_timeout_s": 5}}, "must be longer than gateway.deadline_s"),
        ({"http_option": {}}, "unknown key `http_option`; did you mean `http_options`"),
        ({"applications": []}, "starts one application"),
        ({"applications": [{"name": "x", "import_path": "other:app"}]}, "import_path serve.app:app"),
        ({"applications": [{"name": "x", "import_path": "serve.app:app", "deployments": []}]}, "applications.0.deployments"),
    ],
)
def test_a_file_that_cannot_be_served_says_so(tmp_path, more, sentence):
    with pytest.raises(CxrayError, match=sentence):
        command.read(config(tmp_path / "serve.yaml", {}, **more))


def test_a_taken_port_is_said_before_anything_starts():
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CxrayError, match=r"cannot be listened on .*name another in http_options"):
            command.free("127.0.0.1", taken.getsockname()[1])


def test_why_a_deployment_fails_is_found_in_what_ray_tells():
    trace = "Traceback:\n  File x\ncontracts.errors.CxrayError: /r/model: its weights are missing; train again\n\nRetrying 2 more times"
    status = SimpleNamespace(deployments={"fusion": SimpleNamespace(message=trace)}, message="", status="DEPLOYING")
    assert command.failure(status) == "/r/model: its weights are missing; train again"
    status = SimpleNamespace(deployments={"fusion": SimpleNamespace(message="Retrying")}, message="", status="DEPLOYING")
    assert command.failure(status) is None
    status = SimpleNamespace(deployments={"x": SimpleNamespace(message="Trace\nValueError: odd\n")}, message="", status="DEPLOY_FAILED")
    assert "ValueError: odd" in command.failure(status)


def test_the_first_key_is_shown_once_and_the_pages_changes_with_each_start(tmp_path, monkeypatch):
    file, given = tmp_path / "keys.json", []
    shown, hint = command.first_key(file, "http://x")
    assert "your key" in shown and shown.split()[-1] not in hint  # a command line is for all users to read
    assert "your key" not in command.first_key(file, "http://x")[0]
    ended = nullcontext(SimpleNamespace(terminate=lambda: None))
    monkeypatch.setattr(command.subprocess, "Popen", lambda *_, env, **__: given.append(env["CXRAY_API_KEY"]) or ended)
    for killed in (False, True, False):
        with command.shown("http://x", file):
            assert [key["name"] for key in json.loads(file.read_text())] == ["first", "page"]
            assert Keys(file).name_of(given[-1]) == "page" and not any(key in file.read_text() for key in given)
            left = file.read_text()
        assert [key["name"] for key in json.loads(file.read_text())] == ["first"] and file.stat().st_mode & 0o777 == 0o600
        if killed:  # before it could take its key out
            file.write_text(left)
    assert len(set(given)) == 3
    file.write_text("[{")
    with pytest.raises(CxrayError, match="cannot be read as a file of keys"), command.shown("http://x", file):
        pass


def test_serves_own_lines_are_off_where_the_file_does_not_say(tmp_path):
    """They hold what clients send as ids."""
    assert command.read(config(tmp_path / "serve.yaml", {})).logging == {"log_level": "WARNING", "enable_access_log": False}


@pytest.mark.parametrize(("mode", "said"), [("token", 0), ("disabled", 1), (None, None)])
def test_an_open_cluster_is_refused_unless_it_is_meant(monkeypatch, mode, said):
    lines: list[str] = []
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is None:
        with pytest.raises(CxrayError, match="RAY_AUTH_MODE=token"):
            command.guarded(lines.append)
        return
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    command.guarded(lines.append)
    assert len(lines) == said
