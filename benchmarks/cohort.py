"""How long MIMIC's tables take to become a cohort, in how much memory, and how long the same joins take in pandas.

.venv/bin/python benchmarks/cohort.py [--images 377110 --stays 425000 --vitals 1600000 --labs 10000000] [--pandas-images N] [--tuned]

The tables are made up (`mimic/`), kept in runs/bench for the next time, and not timed. What is timed is `cxray cohort` itself
with its default settings (one frontal image a study; the joins are of all studies), in a process of its own, from csv.gz to the written
Parquet and its data card; and pandas, likewise, at a size that it gets through: the joins as a notebook would hold them (`to_pandas`),
and with `--tuned` the best that could be written (`to_tuned_pandas`). Reports are read apart from both: `--reports` says how many.
Seconds are those of the best of `--times` runs, on the wall and of the CPU, without the start of Python and its imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from mimic.tables import tree
from mimic.world import Sizes

STEPS = (
    "read_studies", "read_images", "assign_splits", "choose_rows", "read_visits", "link_visits", "read_charts", "build_charts",
    "read_targets", "describe", "draw",
)  # fmt: skip


def cohort(folder: Path, out: Path) -> dict[str, Any]:
    """`cxray cohort`: entries by kind, and the seconds of each step."""
    from contracts.config import load
    from pipelines.cohort import job

    marks: list[tuple[str, float]] = []

    def marked(name: str) -> Any:
        step = getattr(job, name)

        def run(*args: Any) -> Any:
            marks.append(("write" if name == "describe" else "", time.monotonic()))  # what lies between two steps is the writing
            result = step(*args)
            marks.append((name, time.monotonic()))
            return result

        return run

    for name in STEPS:
        setattr(job, name, marked(name))
    started = time.monotonic()
    card = job.run(load(job.CohortConfig, {"root": str(folder), "out": str(out)})).card
    ended = [started, *(t for _, t in marks)]
    steps = {name: round(t - before, 2) for (name, t), before in zip(marks, ended) if name}
    counts = {kind: card["chart"][kind] for kind in ("vitals", "medicines", "labs", "history")}
    return {"rows": card["images"]["rows"], **counts, "steps": steps}


def notebook(folder: Path, out: Path) -> dict[str, Any]:
    from mimic.in_notebook import make

    return make(folder, out)


def tuned(folder: Path, out: Path) -> dict[str, Any]:
    from mimic.in_pandas import make

    return make(folder, out)


def reports(folder: Path, out: Path) -> dict[str, Any]:
    from contracts.storage import place
    from pipelines.cohort.reports import read_reports

    archive = folder / "reports/mimic-cxr-reports.zip"
    with zipfile.ZipFile(archive) as names:
        keys = [Path(name).with_suffix("").parts[-2:] for name in names.namelist()]
    return {"rows": read_reports(place(archive), [(int(subject[1:]), int(study[1:])) for subject, study in keys]).num_rows}


def child(what: str, folder: Path) -> None:
    """Do it here, and say as JSON what came out, how long it took and how much memory this process had at its peak."""
    # Imports are not of the work.
    if what in ("notebook", "tuned"):
        import mimic.in_notebook
        import mimic.in_pandas  # noqa: F401
    else:
        import pipelines.cohort.job  # noqa: F401
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        wall, cpu = time.monotonic(), time.process_time()
        result = {"cohort": cohort, "notebook": notebook, "tuned": tuned, "reports": reports}[what](folder, Path(out))
        result |= {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    # Not ru_maxrss, which a child inherits from the process that started it.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps({**result, "peak_gb": int(peak.split()[1]) * 1024 / 1e9}))


def best(what: str, folder: Path, times: int) -> dict[str, Any]:
    """The quickest of some runs, each in a fresh process; the memory is that of the worst."""
    runs = []
    for _ in range(times):
        done = subprocess.run([sys.executable, __file__, "--do", what, str(folder)], check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        r = runs[-1]
        print(f"  {what}: {r['rows']:,} rows in {r['seconds']:.1f} s (CPU {r['cpu_seconds']:.1f} s), {r['peak_gb']:.2f} GB", flush=True)
    return min(runs, key=lambda r: r["seconds"]) | {"peak_gb": max(r["peak_gb"] for r in runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, n in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=n, help=f"rows (default {n:,})")
    parser.add_argument("--below", type=Path, default=Path("runs/bench"), help="where the tables are kept (default runs/bench)")
    parser.add_argument(
        "--pandas-images",
        type=int,
        default=377_110,
        help="size at which pandas is compared (default 377,110, where it needs 10 GB and three minutes); 0: not",
    )
    parser.add_argument("--tuned", action="store_true", help="compare with the best pandas too")
    parser.add_argument("--times", type=int, default=2, help="runs of each, of which the best counts (pandas runs once)")
    parser.add_argument("--do", nargs=2, metavar=("WHAT", "TREE"), help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    if given["do"]:
        child(given["do"][0], Path(given["do"][1]))
        return
    sizes = Sizes(**{name: given[name] for name in vars(Sizes())})
    folder, made = tree(sizes, given["below"])
    print(f"{folder}" + (f" (made in {made:.0f} s)" if made else ""), flush=True)
    ours = best("cohort", folder, given["times"])
    print("    " + ", ".join(f"{name} {seconds}" for name, seconds in ours["steps"].items()))
    texts = best("reports", folder, 1)
    result = {
        "seconds": round(ours["seconds"], 1), "cpu_seconds": round(ours["cpu_seconds"], 1), "peak_gb": round(ours["peak_gb"], 2),
        "images": sizes.images, "stays": sizes.stays, "vitals": sizes.vitals, "labs": sizes.labs, "setting": "one_frontal",
        "reports": texts["rows"], "reports_seconds": round(texts["seconds"], 1),
    }  # fmt: skip
    images = min(sizes.images, given["pandas_images"])
    if images:
        if images != sizes.images:
            folder, _ = tree(sizes.scaled(images), given["below"])
            print(folder, flush=True)
            ours = best("cohort", folder, given["times"])
        rivals = {"pandas": best("notebook", folder, 1)} | ({"tuned_pandas": best("tuned", folder, 1)} if given["tuned"] else {})
        result |= {"pandas_images": images, "seconds_there": round(ours["seconds"], 1)}
        for name, theirs in rivals.items():
            for kind in ("rows", "vitals", "medicines", "labs", "history"):
                assert ours[kind] == theirs[kind], f"{kind}: {ours[kind]:,} entries here, {theirs[kind]:,} in {name}"
            result |= {
                f"to_{name}": round(theirs["seconds"] / ours["seconds"], 1),
                f"to_{name}_cpu": round(theirs["cpu_seconds"] / ours["cpu_seconds"], 1),
                f"{name}_seconds": round(theirs["seconds"], 1), f"{name}_peak_gb": round(theirs["peak_gb"], 2),
            }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
