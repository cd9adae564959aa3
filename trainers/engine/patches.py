"""What Ray 2.60 lacks here, put right in its own insides: all that may break with another version of it.

Each says its reason, and the test that fails without it.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

LAST_WISHES_S = 10.0  # how long a dead run's CPUs are freed: it counts as dead a moment before its process ends, which may still ask


def trainer_class() -> type[Any]:
    """TorchTrainer, whose workers' CPUs are freed where the run is killed from outside, as Tune does with a trial that it stops.

    Ray's asks the dashboard of whichever cluster it finds on the machine whether the run lives: without one it gives up, and another
    cluster knows of no such run, so that one that does live would lose its CPUs. This one asks its own cluster.
    (test_sweep.py: test_asha_stops_a_training_run_that_is_behind_and_its_cpus_go_to_the_next)

    And Ray's hears of a placement group only when its workers stand. But a stopped run's worker may die first, which the run takes for a
    failure: it asks for CPUs anew, and is killed before it says so. So each group has its run's id in its name, by which it is found.
    (test_sweep.py: test_what_a_killed_run_had_just_asked_for_is_freed_too)
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import placement_group_callback as callback
    from ray.train.v2._internal.execution.controller import placement_group_cleaner as cleaner
    from ray.train.v2._internal.execution.worker_group import worker_group
    from ray.util.placement_group import placement_group

    def lives(actor_id: str, timeout: float) -> bool:
        from ray._private.state import actors

        return actors(actor_id).get("State", "DEAD") != "DEAD"

    class Cleaner(cleaner.PlacementGroupCleaner):
        def start_monitoring(self) -> bool:
            cleaner.is_actor_alive = lives  # pyright: ignore[reportPrivateImportUsage]
            return super().start_monitoring()

        def _cleanup_placement_group(self, placement_group: Any) -> None:
            free(self._controller_actor_id, LAST_WISHES_S)

    class Callback(callback.PlacementGroupCleanerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            callback.PlacementGroupCleaner = Cleaner  # pyright: ignore[reportPrivateImportUsage]
            super().after_controller_start(train_run_context)
            named = partial(named_after, str(self._controller_actor_id), placement_group)
            worker_group.placement_group = named  # pyright: ignore[reportPrivateImportUsage]

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            ours = Callback(check_interval_s=0.25)
            return [ours if isinstance(c, callback.PlacementGroupCleanerCallback) else c for c in super()._create_default_callbacks()]

    return Trainer


def named_after(actor_id: str, make: Callable[..., Any], *args: Any, **given: Any) -> Any:
    """The placement group that `make` makes, under a name by which `free` finds it."""
    return make(*args, **given | {"name": f"{actor_id}-{uuid.uuid4().hex}"})


def free(actor_id: str, seconds: float) -> None:
    """Removes all placement groups that were named after this actor, also those that come up within the next seconds."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    until = time.monotonic() + seconds
    while True:
        for hexed, group in placement_group_table().items():
            if group["name"].startswith(f"{actor_id}-") and group["state"] != "REMOVED":
                remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(hexed))))
        if time.monotonic() >= until:
            return
        time.sleep(0.25)


@contextmanager
def telling_tune() -> Iterator[list[Any]]:
    """Callbacks for a training run; within a trial of Ray Tune's they tell it the metrics of each epoch, so that it can stop the trial.

    Ray's own TuneReportCallback tells those of every report, checkpoints within an epoch too, which would count as epochs. And it hangs
    where Tune is busy while the last epoch's metrics and the trial's own end come in: the thread that takes results out puts the former
    in, behind the latter. Here a thread of the trial's reports what comes, and the trial ends after it. Tune's metrics leave the run
    through a queue, as it lives in another process. There is no public way to ask whether this is a trial.
    (test_sweep.py: test_asha_stops_a_training_run_that_is_behind_and_its_cpus_go_to_the_next,
    test_epochs_that_end_while_tune_is_busy_are_told_before_the_trials_end)
    """
    from ray import tune
    from ray.train import UserCallback
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session  # as TuneReportCallback asks itself
    from ray.util.queue import Queue

    if not _in_tune_session():
        yield []
        return
    told = Queue(actor_options={"num_cpus": 0})

    class EachEpoch(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]["step"] == 0:
                told.put(metrics[0])

    def tell() -> None:
        while metrics := told.get():
            tune.report(metrics)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield [EachEpoch()]
    finally:
        told.put(None)
        teller.join()
