"""Run a verb in a process of its own and kill something of it in the middle."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("worker", "actor", "driver", "node", "raylet")
BOOKS = re.compile("Actor|Tracker|Requester|Agent")
SOON_MISSED = {"health_check_period_ms": 300}  # Ray by itself asks every 3 s, and takes a node for lost after five times without an answer
LONGEST = 240  # seconds a verb may take here before it counts as hanging


def start(verb: str, config: dict, folder: Path, nodes: bool = False) -> subprocess.Popen:
    """`cxray VERB` as a process; with `nodes` on a cluster of two nodes that it starts itself."""
    file = folder / f"{verb}.yaml"
    file.write_text(yaml.safe_dump(config))
    front = [str(Path(__file__)), verb, str(file)] if nodes else ["-m", "cxray", verb, str(file)]
    log = (folder / f"{verb}.log").open("ab")
    return subprocess.Popen([sys.executable, *front], cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)


def committed(out: Path) -> int:
    """Rows that are safely written."""
    files = [f for f in (out / "_checkpoint").glob("*.parquet") if not f.name.endswith(".pending.parquet")]
    return sum(pq.read_metadata(f).num_rows for f in files)


def kill(kind: str, process: subprocess.Popen, rng: random.Random) -> bool:
    """Kill one of that kind that is at work; False where there is none. Ray's own actors and agents, which keep its books, are no kind."""
    if kind == "driver":
        process.kill()
        return True
    if kind == "node":
        assert process.stdin is not None
        process.stdin.write(b"kill\n")
        process.stdin.flush()
        return True
    below = descendants(process.pid)
    busy = [(pid, name) for pid, name in below if name.startswith("ray::") and "IDLE" not in name]
    actors = {pid for pid, name in busy if name.startswith("ray::MapWorker")}
    workers = {pid for pid, name in busy if not BOOKS.search(name)} - actors
    raylets = {pid for pid, name in below if name.partition(" ")[0].endswith("/raylet")}
    found = {"actor": actors, "worker": workers, "raylet": raylets}[kind]
    try:
        os.kill(rng.choice(sorted(found)), signal.SIGKILL)
    except (IndexError, ProcessLookupError):  # nobody there, or ended meanwhile
        return False
    return True


def descendants(root: int) -> list[tuple[int, str]]:
    """(process id, command line) of all that `root` started, and what those started."""
    parent, name = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                name[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
    below, seen = [root], []
    while below:
        pid = below.pop()
        children = [child for child, p in parent.items() if p == pid]
        seen += [(child, name[child]) for child in children]
        below += children
    return seen


def strike(verb: str, config: dict, folder: Path, kinds: Sequence[str], when: Callable[[str], bool], seed: int = 0) -> tuple[bool, bool]:
    """Start the verb, kill one of each kind in turn as soon as `when(kind)`, let it end: (all were killed, it ended well all the same).

    However it ended, who looked on saw no traceback.
    """
    process = start(verb, config, folder, nodes="node" in kinds)
    deadline, left, rng, log = time.monotonic() + LONGEST, list(kinds), random.Random(seed), folder / f"{verb}.log"
    while process.poll() is None and left:
        assert time.monotonic() < deadline, f"{verb} hangs: {log.read_text()[-2000:]}"
        if when(left[0]) and kill(left[0], process, rng):
            left.pop(0)
        time.sleep(0.02)  # between looks at the process table; what is waited for is `when`
    ended_well = process.wait(LONGEST) == 0
    assert "Traceback" not in log.read_text(), log.read_text()[-4000:]
    return not left, ended_well


def on_two_nodes(verb: str, file: str) -> None:
    """The verb on a cluster of two nodes, of which one is killed when a line comes in on standard input."""
    import ray
    from ray.cluster_utils import Cluster

    import cxray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": SOON_MISSED})
    node = cluster.add_node(num_cpus=2)
    os.environ["RAY_ADDRESS"] = str(cluster.address)

    def wait() -> None:
        if sys.stdin.readline():
            cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=wait, daemon=True).start()
    sys.argv = ["cxray", verb, file]
    try:
        cxray.main()
    finally:  # before the cluster goes, which otherwise goes first, and takes this process with it
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    on_two_nodes(*sys.argv[1:])
