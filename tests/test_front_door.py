"""The command line: what is wrong is said in a line or two, without a traceback, and nothing is left half-written."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from trees import write_tree

import cxray
from contracts.config import load, read_yaml
from contracts.runs import finished, record
from contracts.storage import place
from pipelines.cohort.job import CohortConfig
from trainers.sources import FusionConfig


@pytest.fixture
def run(monkeypatch, capsys):
    """Call the front door as a shell would: (exit code, standard output, standard error)."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cxray", *words])
        with pytest.raises(SystemExit) as end:
            cxray.main()
            raise SystemExit(0)
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call


def config(folder: Path, text: str) -> str:
    (folder / "c.yaml").write_text(text)
    return str(folder / "c.yaml")


def one_line(said: str) -> bool:
    return said.startswith("cxray: ") and "Traceback" not in said and len(said.strip().splitlines()) <= 2


@pytest.mark.parametrize(
    ("words", "text", "sentence"),
    [
        (["cohort"], "imags: all", "did you mean `images`"),
        (["cohort"], "root: nowhere", "no MIMIC-CXR-JPG tables"),
        (["cohort"], "sources: {mimic_iv: nowhere}", "sources.mimic_iv: nowhere has no hosp/patients"),
        (["images"], "cohort: nothing", "no finished cohort here"),
        (["features"], "images: nothing", "no finished images here"),
        (["texts"], "cohort: nothing", "no finished cohort here"),
        (["texts"], "report: [finding]", "`report.0`: Input should be 'examination'"),
        (["index"], "features: nothing", "no finished cohort here"),
        (["run"], "steps: [{cohrt: {}}]", "unknown verb `cohrt`"),
        (["run"], "steps: []", "a chain needs `steps`"),
        (["run"], "{steps: [{cohort: {}}], wrok: 1}", "unknown key `wrok`"),
        (["run"], "steps: [{cohort: nowhere.yaml}]", "No such file"),
    ],
)
def test_a_wrong_config_is_one_sentence(run, tmp_path, words, text, sentence):
    file = config(tmp_path, text)
    code, _, said = run(*words, file, "--set", f"out={tmp_path / 'out'}")
    assert code == 1 and one_line(said) and sentence in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_data_set_fails_to_verify(run, tmp_path):
    code, _, said = run("verify", str(tmp_path))
    assert code == 1 and one_line(said)


def test_a_chain_runs_in_order_and_skips_what_is_finished_and_unchanged(run, tmp_path):
    tree = write_tree(tmp_path / "tree", edstays=[{}])
    chain = config(tmp_path, f"root: {tree}\nout: {tmp_path}/out\nsteps: [cohort: {{}}]")
    code, out, _ = run("run", chain)
    assert code == 0 and "1 rows of 1 images" in out
    assert "finished before, and unchanged" in run("run", chain)[1]
    assert "1 rows of 1 images" in run("run", chain, "--set", "ed_window_hours=12")[1]
    write_tree(tree, edstays=[{}, {"stay_id": 30000002}])
    assert "1 rows of 1 images" in run("run", chain, "--set", "ed_window_hours=12")[1], "a changed table is a changed cohort"


def test_every_output_says_what_made_it(run, tmp_path):
    tree = write_tree(tmp_path / "tree")
    run("cohort", config(tmp_path, f"root: {tree}"), "--set", f"out={tmp_path / 'out'}")
    said = json.loads((tmp_path / "out/cohort/run.json").read_text())
    assert said["verb"] == "cohort" and said["config"]["root"] == str(tree) and said["versions"]["ray"] and said["code_revision"]


def test_a_data_set_made_with_another_version_of_the_columns_is_refused(tmp_path):
    from trees import cohort

    from contracts.dataset import MANIFEST, open_dataset
    from contracts.errors import CxrayError

    cohort(write_tree(tmp_path / "tree"), tmp_path / "out")
    manifest = tmp_path / "out/cohort" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    with pytest.raises(CxrayError, match="another version"):
        open_dataset(place(tmp_path / "out/cohort"), "cohort")


def test_every_config_in_the_checkout_is_one_that_its_verb_takes():
    from contracts.config import load, read_yaml

    configs = Path(cxray.__file__).parent / "configs"
    for chain in configs.glob("*/*.yaml"):
        values = read_yaml(chain)
        for step in values.pop("steps", []):
            verb, source = cxray._step(chain, step)
            load(cxray._verb(verb)[1], source, shared=values)
    assert load(CohortConfig, configs / "mimic/cohort.yaml").sources.mimic_iv


def test_help_needs_no_heavy_library():
    heavy = "import cxray, sys; print([m for m in ('torch', 'ray', 'duckdb', 'transformers', 'faiss') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", heavy], cwd=Path(cxray.__file__).parent, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


CONFIGS = sorted((Path(cxray.__file__).parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_every_config_here_is_one_that_its_verb_takes(file):
    """Those of a chain too, with what the chain says for all."""
    values = read_yaml(file)
    steps = values.pop("steps", None)
    if steps is None:
        verb = "train" if file.stem in ("fusion", "finetune") else file.stem
        lines = [(verb, file)] if verb in cxray.VERBS else []  # sources.yaml is there to be extended
    else:
        lines = [(verb, file.parent / of if isinstance(of, str) else of or {}) for step in steps for verb, of in step.items()]
    for verb, of in lines:
        module, kind = import_module(cxray.VERBS[verb][0]), cxray.VERBS[verb][1]
        load(getattr(module, kind), of, (), shared=values if steps else None)
    assert lines or file.name in ("sources.yaml", "serve.yaml")  # the latter is of Ray's own format: test_serve_app.py


def test_a_finished_run_stays_finished_where_only_its_resources_change(tmp_path):
    """Also where they stand deep in the settings, as a training's do."""
    here, before = place(tmp_path), FusionConfig(out=str(tmp_path))
    record(here, "train", before, {}, {})
    more = before.training.resources.model_copy(update={"workers": 2})
    assert finished(here, "train", before.model_copy(update={"training": before.training.model_copy(update={"resources": more})}), {})
    assert not finished(here, "train", before.model_copy(update={"training": before.training.model_copy(update={"lr": 0.5})}), {})
