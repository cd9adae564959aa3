"""Where a job's time and memory went: its stages, the slowest one and what would speed it up.

The figures are Ray Data's own (`Dataset.get_stats_summary`); memory is read off the processes of this machine.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.pages import bars
from contracts.storage import Place
from pipelines.pool import joined

# Of its wall time a stage that computes spends most on a CPU; one that waits for a store or a service does not.
WAITS_BELOW = 0.5


@dataclass
class Slots:
    """What a stage had: `most` tasks or actors at work at once, and the share of a GPU of each."""

    most: int = 0
    actors: bool = False
    gpus: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One operator of the plan. seconds: summed over its tasks, by the wall and on CPUs."""

    name: str
    wall_s: float
    cpu_s: float
    slots: Slots

    @property
    def alone_s(self) -> float:
        """How long it takes however fast the others are: the stage with the longest holds the job up. A sum over all tasks would name
        many slow readers before the one GPU that is never idle."""
        return self.wall_s / max(self.slots.most, 1)


def stages(summary: Any, slots: Mapping[str, Slots]) -> list[Stage]:
    """Ray's summary of an execution -> its stages, in order. Resumed jobs that had nothing to do have none."""
    found = []

    def collect(part: Any) -> None:
        for parent in part.parents:
            collect(parent)
        for operator in part.operators_stats:
            if operator.wall_time is not None:
                cpu, name = operator.cpu_time.sum if operator.cpu_time is not None else 0.0, operator.operator_name
                found.append(Stage(name, operator.wall_time.sum, cpu, slots.get(name, Slots())))

    collect(summary)
    return found


def lines(summary: Any, slots: Mapping[str, Slots], peak_bytes: int) -> list[str]:
    """What a person wants to know of it, for a job's closing summary."""
    said = []
    if found := stages(summary, slots):
        slowest = max(found, key=lambda s: s.alone_s)
        fed = any(s.slots.gpus for s in found if s is not slowest)
        share = f"{slowest.wall_s:.0f} s of work, {max(slowest.slots.most, 1)} at once"
        said.append(f"slowest stage: {plain(slowest.name)} ({share}), {_advice(slowest, fed)}")
    if spilled := getattr(summary, "dataset_bytes_spilled", 0):
        said.append(f"spilled to disk: {spilled / 1e9:.1f} GB (smaller batches, or more memory, would keep it off)")
    whose = "of this process; that of its workers is the cluster's to say" if joined() else "on this machine"
    said.append(f"peak memory {whose}: {peak_bytes / 1e9:.1f} GB")
    return said


def plain(name: str) -> str:
    """'ReadParquet->MapBatches(EncodeImages)' -> 'read, EncodeImages'."""
    parts = [part.partition("(") for part in name.split("->")]
    return ", ".join(inner.rstrip(")") if head == "MapBatches" else head.removesuffix("Parquet").lower() for head, _, inner in parts)


def _advice(stage: Stage, feeds_gpu: bool) -> str:
    """feeds_gpu: another stage has one."""
    waits = stage.cpu_s < WAITS_BELOW * stage.wall_s
    if stage.slots.gpus:  # how much of its time the GPU was busy Ray does not know, and a CPU that waits for it looks busy
        return "which holds a GPU: two encoders on each (resources.gpus: 0.5) where it idles while they decode, else another GPU"
    if waits and stage.slots.actors:
        return "which waits: for a service, or for other work on these CPUs"
    if waits:
        return "which waits: for a store, where more fetches (resources.fetches) would speed it up, or for other work on these CPUs"
    more = "more CPUs a GPU" if feeds_gpu else "more CPUs, or a GPU," if stage.slots.actors else "more CPUs"
    return f"which computes on CPUs: {more} would speed it up"


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


def draw(summary: Any, slots: Mapping[str, Slots], out: Place) -> list[str]:
    """Write `timeline.json` (for a browser's chrome://tracing, or ui.perfetto.dev) and `stages.png` into a job's folder; a line where the
    first is empty."""
    import json

    import ray

    events = ray.timeline()
    (out / "timeline.json").write(json.dumps(events).encode())
    (out / "stages.png").write(bars({plain(s.name): s.wall_s for s in stages(summary, slots)}, "seconds of all tasks together"))
    return [] if events else ["timeline.json is empty: this Ray was told to keep no record of its tasks"]
