"""What the processes of a service take of the cores and of the memory, by what they are."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipelines.speed import resident

NAMES = ("ProxyActor", "gateway", "image", "fusion", "search", "text", "ServeController", "raylet", "gcs_server")


def below(pid: int) -> Iterator[int]:
    """`pid`, and all that it started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        for child in (task / "children").read_text().split():
            yield from below(int(child))


def cores(pid: int) -> Counter[str]:
    """Seconds on a core until now, of each kind of process below `pid`."""
    seconds: Counter[str] = Counter()
    for each in below(pid):
        user, system = map(int, Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:13])
        seconds[_name(each)] += (user + system) / os.sysconf("SC_CLK_TCK")
    return seconds


def held(pid: int) -> int:
    """Bytes of memory of all below `pid`: each one's own, and what they share once."""
    of = [resident(each) for each in below(pid)]
    return sum(own for own, _ in of) + max((shared for _, shared in of), default=0)


def cluster(pid: int) -> str:
    """The address of the Ray that was started below `pid`."""
    lines = [_command(each) for each in below(pid)]
    return next(word.partition("=")[2] for line in lines for word in line.split() if word.startswith("--gcs-address="))


def _name(pid: int) -> str:
    parts = _command(pid).replace(":", " ").replace("/", " ").replace(".", " ").split()
    return next((name for name in NAMES if name in parts), "other")


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
