"""What a running job waits for, what its stages had, and which of them ended it: Ray Data knows, and says so only in logs.

Ray makes a `Watch` for each execution, and calls it between its steps.
"""

import sys
import time
from typing import Any, ClassVar

from ray.data._internal.execution.execution_callback import ExecutionCallback  # what the context's public list of callbacks wants
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from tqdm import tqdm

from contracts.errors import CxrayError
from pipelines.speed import Slots, plain

QUIET_S = 180.0  # so long without a row of any stage, and a line says what is waited for
KILLED = (NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError)


class Watch(ExecutionCallback):
    """slots: of the last execution's stages, by Ray's names for them."""

    slots: ClassVar[dict[str, Slots]] = {}

    def before_execution_starts(self, executor: Any) -> None:
        type(self).slots = {}
        self._rows, self._since, self._said = 0, time.monotonic(), 0.0

    def on_execution_step(self, executor: Any) -> None:
        stages = executor._topology
        for op in stages:
            actors = bool(op.get_autoscaling_actor_pools())
            found = self.slots.setdefault(op.name, Slots(actors=actors, gpus=op.min_scheduling_resources().gpu or 0.0))
            found.most = max(found.most, op.get_actor_info().running if actors else op.num_active_tasks())
        rows, now = sum(op.metrics.row_outputs_taken for op in stages), time.monotonic()
        if rows != self._rows:
            self._rows, self._since = rows, now
        elif now - max(self._since, self._said) > QUIET_S:
            self._said = now
            tqdm.write(f"no row for {(now - self._since) / 60:.0f} minutes: {waits(stages)}", file=sys.stderr)

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Ray has tried again as often as it may. `sentence` finds the words beside what it raises."""
        if isinstance(error, KILLED) and not getattr(error, "_actor_init_failed", False):
            failed = max(executor._topology, key=lambda op: (op.metrics.num_tasks_failed, bool(op.get_autoscaling_actor_pools())))
            error.cause = CxrayError(killed(failed.name, isinstance(error, OutOfMemoryError)))


def killed(stage: str, no_memory: bool) -> str:
    why = "the machine had no memory left" if no_memory else "they make it crash, or the machine had no memory left"
    return (
        f"{plain(stage)}: the process at work on some rows was killed each time they were tried: {why}. "
        "Give it less at once (resources.batch) or more memory, and run the same command again"
    )


def waits(stages: Any) -> str:
    """The stage nearest to the end that has something to do, and what keeps it. stages: Ray's operators and their states."""
    import ray

    free = ray.available_resources()
    for op, state in reversed(stages.items()):
        actors, tasks, blocks, wants = (
            op.get_actor_info(), op.num_active_tasks(), state.total_enqueued_input_blocks(), op.min_scheduling_resources(),
        )  # fmt: skip
        takes = " and ".join(f"{n:g} {kind} ({free.get(kind, 0):g} free)" for kind, n in (("CPU", wants.cpu), ("GPU", wants.gpu)) if n)
        if not actors.running and (late := actors.pending + actors.restarting):
            return f"{plain(op.name)} waits for {late} of its processes to start, each with {takes}"
        if tasks:
            return f"{plain(op.name)} is at work on {tasks} blocks of rows, or waits for its turn, each with {takes}"
        if blocks:
            return f"{plain(op.name)} has {blocks} blocks of rows to do and starts none, each with {takes}"
    return "Ray does not say for what"
