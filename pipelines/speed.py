"""Where a job's time and memory went: its stages, the slowest one and what would speed it up.

The figures are Ray Data's own (`Dataset.get_stats_summary`); memory is read off the processes of this machine.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.pages import bars
from contracts.storage import Place

# Of its wall time a stage that computes spends most on a CPU; one that waits for a bucket, or for a GPU, does not.
WAITS_BELOW = 0.5


@dataclass(frozen=True)
class Stage:
    """One operator of the plan. seconds: summed over its tasks, by the wall and on CPUs."""

    name: str
    wall_s: float
    cpu_s: float

    @property
    def waits(self) -> bool:
        return self.cpu_s < WAITS_BELOW * self.wall_s


def stages(summary: Any) -> list[Stage]:
    """Ray's summary of an execution -> its stages, in order. Resumed jobs that had nothing to do have none."""
    found = []

    def collect(part: Any) -> None:
        for parent in part.parents:
            collect(parent)
        for operator in part.operators_stats:
            if operator.wall_time is not None:
                cpu = operator.cpu_time.sum if operator.cpu_time is not None else 0.0
                found.append(Stage(operator.operator_name, operator.wall_time.sum, cpu))

    collect(summary)
    return found


def lines(summary: Any, peak_bytes: int) -> list[str]:
    """What a person wants to know of it, for a job's closing summary."""
    found = stages(summary)
    said = []
    if found:
        slowest = max(found, key=lambda s: s.wall_s)
        share = slowest.wall_s / max(sum(s.wall_s for s in found), 1e-9)
        said.append(f"slowest stage: {plain(slowest.name)} ({share:.0%} of the work), {_advice(slowest)}")
    if spilled := getattr(summary, "dataset_bytes_spilled", 0):
        said.append(f"spilled to disk: {spilled / 1e9:.1f} GB (smaller batches, or more memory, would keep it off)")
    said.append(f"peak memory on this machine: {peak_bytes / 1e9:.1f} GB")
    return said


def plain(name: str) -> str:
    """'ReadParquet->MapBatches(EncodeImages)' -> 'read, EncodeImages'."""
    parts = [part.partition("(") for part in name.split("->")]
    return ", ".join(inner.rstrip(")") if head == "MapBatches" else head.removesuffix("Parquet").lower() for head, _, inner in parts)


def _advice(stage: Stage) -> str:
    encodes = "Encode" in stage.name
    if encodes and stage.waits:
        return "which waits for its encoder: a larger batch or another GPU would speed it up"
    if encodes:
        return "which computes on CPUs: more CPUs, or a GPU, would speed it up"
    if stage.waits:
        return "which waits: for a store, where more fetches (resources.fetches) would speed it up, or for other work on these CPUs"
    return "which computes: more CPUs would speed it up (with a GPU encoder behind it, more CPUs a GPU)"


def memory() -> int:
    """Bytes held now by this process and all that it started: each one's own, and what they share (libraries, the object store) once."""
    held = [resident(pid) for pid in _below(os.getpid())]
    return sum(own for own, _ in held) + max((shared for _, shared in held), default=0)


def _below(root: int) -> Iterator[int]:
    parent = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdigit():
            try:
                parent[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended meanwhile
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += [child for child, of in parent.items() if of == pid]


def resident(pid: int) -> tuple[int, int]:
    """(bytes of memory of a process's own, bytes that it shares with others); nothing where it has ended.

    From statm, which costs nothing; smaps, which is exact, holds the process up while it walks its pages.
    """
    try:
        _, whole, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except OSError:
        return 0, 0
    page = os.sysconf("SC_PAGE_SIZE")
    return (whole - shared) * page, shared * page


def draw(summary: Any, out: Place) -> None:
    """Write `timeline.json` (for a browser's chrome://tracing, or ui.perfetto.dev) and `stages.png` into a job's folder."""
    import json

    import ray

    (out / "timeline.json").write(json.dumps(ray.timeline()).encode())
    seconds = {plain(s.name): s.wall_s for s in stages(summary)}
    (out / "stages.png").write(bars(seconds, "seconds of all tasks together"))
