"""cxray: chest X-rays on Ray. The front door: every verb, a line each.

cxray VERB CONFIG.yaml --set a.b=c        cohort, images, features, knowledge, texts, index, leaks,
                                          train, sweep, ablate, predict, evaluate, explain, overview
cxray run all.yaml                        a chain of them; what is finished and unchanged is skipped
cxray synth OUT, cxray verify DIR, cxray search INDEX
cxray serve CONFIG.yaml --ui, cxray key NAME --keys FILE, cxray ui
"""

import json
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from contracts.config import Config, load, merge, parse_set, read_yaml
from contracts.errors import CxrayError
from contracts.runs import finished
from contracts.storage import place

# verb -> (module, its config, what it does); `module.run(config)` is the verb. Modules are imported when they are asked for.
VERBS = {
    "synth": ("pipelines.synthetic.job", "SynthConfig", "Make a synthetic MIMIC to try everything on."),
    "cohort": ("pipelines.cohort.job", "CohortConfig", "MIMIC's tables -> one row an image, and a data card."),
    "images": ("pipelines.images.job", "ImagesConfig", "A cohort's image files -> stored pictures."),
    "features": ("pipelines.features", "FeaturesConfig", "Stored pictures -> an image encoder's embeddings and tokens."),
    "knowledge": ("pipelines.knowledge.base", "KnowledgeConfig", "Passages, ours and your own -> a knowledge base that notes ask."),
    "texts": ("pipelines.texts", "TextsConfig", "A cohort's charts and reports -> notes, their passages, a text encoder's embeddings."),
    "index": ("pipelines.search.index", "IndexConfig", "Embeddings -> a search index."),
    "leaks": ("evaluation.leaks", "LeaksConfig", "How much of the answer the notes hold, before and after the filter."),
    "train": ("trainers.fusion", "FusionConfig", "Features, texts and charts -> a trained model."),
    "sweep": ("trainers.sweep", "SweepConfig", "Many training runs, by Ray Tune -> the best settings."),
    "ablate": ("trainers.ablate", "AblateConfig", "Does knowledge help, and for whom? Variants, seeds, intervals, a page."),
    "predict": ("trainers.predict", "PredictConfig", "A trained model's word on a cohort's splits, or on any files."),
    "evaluate": ("evaluation.evaluate", "EvaluateConfig", "Predictions -> how good they are: intervals, calibration, subgroups, a page."),
    "explain": ("trainers.explain", "ExplainConfig", "What a trained network looked at, in a few studies of test, as pictures."),
    "overview": ("pipelines.overview.job", "OverviewConfig", "One page of what a folder of outputs holds."),
}

STOPPED = 130  # how typer ends at Ctrl-C, without a word
PROFILED = ("images", "features", "texts")  # their stages are Ray's

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a setting; the value is YAML.")]
Profile = Annotated[bool, typer.Option("--profile", help="Write a timeline, and a picture of the time by stage.")]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to do, on what.")]


def _verb(name: str) -> tuple[Any, type[Config]]:
    module = import_module(VERBS[name][0])
    return module, getattr(module, VERBS[name][1])


def _add(name: str) -> None:
    def verb(config: ConfigFile, set: Sets = None) -> None:
        module, kind = _verb(name)
        typer.echo(module.run(load(kind, config, set or [])))

    def with_profile(config: ConfigFile, set: Sets = None, profile: Profile = False) -> None:
        verb(config, [*(set or []), *(["profile=true"] if profile else [])])

    app.command(name, help=VERBS[name][2])(with_profile if name in PROFILED else verb)


for _name in VERBS.keys() - {"synth", "train", "predict"}:
    _add(_name)


@app.command(help=VERBS["synth"][2])
def synth(out: str, patients: int = 300, seed: int = 0, dicom: bool = False) -> None:
    module, kind = _verb("synth")
    typer.echo(
        module.run(load(kind, {"out": str(Path(out).parent), "into": Path(out).name, "patients": patients, "seed": seed, "dicom": dicom}))
    )


@app.command(help=VERBS["train"][2])
def train(
    config: ConfigFile,
    set: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="One batch through data, model, loss, step and checkpoint.")] = False,
) -> None:
    module, kind = _verb("train")
    typer.echo((module.try_out if dry_run else module.run)(load(kind, config, set or [])))


@app.command(help=VERBS["predict"][2])
def predict(
    what: Annotated[str, typer.Argument(metavar="CONFIG.yaml|RUN", help="A config, for a cohort's splits; a run folder, for files.")],
    set: Sets = None,
    images: Annotated[str | None, typer.Option(help="A glob of JPEG, PNG or DICOM, or a table with a column `path`.")] = None,
    charts: Annotated[str | None, typer.Option(help="A table of charts by `row_id` or `path`.")] = None,
    out: Annotated[str, typer.Option(help="The Parquet file to write.")] = "predictions.parquet",
) -> None:
    module, kind = _verb("predict")
    if not what.endswith((".yaml", ".yml")):
        typer.echo(module.predict_files(what, images, charts, out))
    elif images or charts:
        raise CxrayError("--images and --charts go with a run folder, not with a config")
    else:
        typer.echo(module.run(load(kind, Path(what), set or [])))


@app.command()
def run(chain: ConfigFile, set: Sets = None) -> None:
    """Run a chain: a YAML whose `steps` name verbs and their configs, in order."""
    started = time.monotonic()
    values = read_yaml(chain)
    for item in set or []:
        values = merge(values, parse_set(item))
    steps = [_step(chain, step) for step in values.pop("steps", None) or []]
    if not steps:
        raise CxrayError(f"{chain}: a chain needs `steps`, a list of `verb: config` lines")
    kinds = [_verb(verb)[1] for verb, _ in steps]
    if strangers := [key for key in values if not any(key in kind.model_fields for kind in kinds)]:
        raise CxrayError(f"{chain}: unknown key `{strangers[0]}`: no step of this chain has such a setting")
    # All configs are read before anything runs: a slip in the last step should not cost the first ones.
    configs = [load(kind, source, (), shared=values) for kind, (_, source) in zip(kinds, steps, strict=True)]
    for (verb, _), config in zip(steps, configs, strict=True):
        module, _ = _verb(verb)
        unchanged = getattr(module, "unchanged", None) or _unchanged
        typer.echo(f"{verb}: finished before, and unchanged" if unchanged(verb, config) else module.run(config))
    typer.echo(f"{chain.name}: {len(steps)} steps in {time.monotonic() - started:.0f} s")


def _unchanged(verb: str, config: Any) -> bool:
    return finished(config.output(), verb, config, config.inputs())


def _step(chain: Path, step: Any) -> tuple[str, Any]:
    """A line of `steps` -> (verb, path of its config or the settings themselves)."""
    if not isinstance(step, dict) or len(step) != 1:
        raise CxrayError(f"{chain}: each step is one `verb: config.yaml` or `verb: {{settings}}` line, not {step!r}")
    verb, source = next(iter(step.items()))
    if verb not in VERBS:
        raise CxrayError(f"{chain}: unknown verb `{verb}`; there are {', '.join(VERBS)}")
    return verb, chain.parent / source if isinstance(source, str) else source or {}


@app.command()
def verify(folder: str, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Check a data set: rows in = rows out + rejects, each id once, its columns, finite vectors."""
    from pipelines.verify import verify as check

    verdict = check(place(folder))
    typer.echo(json.dumps(verdict.json()) if as_json else verdict)
    raise typer.Exit(0 if verdict.clean else 1)


@app.command()
def search(
    index: str,
    text: Annotated[str | None, typer.Option(help="What to look for, in words.")] = None,
    image: Annotated[Path | None, typer.Option(help="A JPEG, PNG or DICOM to look for the like of.")] = None,
    via: Annotated[str | None, typer.Option(help="'image' or 'report': what to compare with.")] = None,
    where: Annotated[str | None, typer.Option(help="SQL over study_id, split, view and labels, such as \"split = 'test'\".")] = None,
    k: Annotated[int, typer.Option("-k", help="How many studies.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Ask a search index: studies like these words, this image, or both."""
    from pipelines.search.ask import Index, table

    if image is not None and not image.is_file():
        raise CxrayError(f"--image {image}: no such file")
    answers = Index(place(index)).search(text, image.read_bytes() if image else None, via, where, k)
    typer.echo(json.dumps([a.__dict__ for a in answers]) if as_json else table(answers))


@app.command()
def serve(
    config: ConfigFile,
    set: Sets = None,
    page: Annotated[bool, typer.Option("--ui", help="With the page to try it on.")] = False,
) -> None:
    """Serve trained runs over HTTP, till Ctrl-C: a YAML of Ray's `serve deploy`."""
    from serve.run import run as serve_models

    serve_models(config, set or [], page, typer.echo)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Who is to have it; stands in the access log.")],
    keys: Annotated[Path, typer.Option(help="The service's file of keys (gateway.keys).")],
) -> None:
    """Make a key for a service, and show it this once."""
    from serve.security import new_key

    typer.echo(new_key(keys, name))


@app.command()
def ui(port: Annotated[int, typer.Option(help="The page's own.")] = 8501) -> None:
    """The page to try a service on: that of CXRAY_API (http://127.0.0.1:8000), with the key of CXRAY_API_KEY or one typed in."""
    from serve.ui.run import run as serve_page

    serve_page(port)


def main() -> None:
    """Run a verb; what the user can put right is one or two lines and exit 1, never a traceback."""
    try:
        app(standalone_mode=True)
    except CxrayError as error:
        typer.echo(f"cxray: {error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != STOPPED:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would end Ray's shutdown, not sooner but with a traceback
        typer.echo("cxray: stopped; the same command goes on from here", err=True)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
