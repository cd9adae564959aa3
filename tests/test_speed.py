"""What a job says of its own time and memory, of what it waits for, and of what ended it."""

import json
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from types import SimpleNamespace

import pytest
import ray

from contracts.errors import CxrayError
from contracts.storage import place
from pipelines import speed, watch
from pipelines.pool import EncoderResources, encoder_pool
from pipelines.speed import Slots, lines, memory, plain, stages
from pipelines.watch import Watch

ENCODE, PREPARE = "MapBatches(EncodeImages)", "MapBatches(step)->Write"


def operator(name: str, wall: float, cpu: float) -> SimpleNamespace:
    return SimpleNamespace(operator_name=name, wall_time=SimpleNamespace(sum=wall), cpu_time=SimpleNamespace(sum=cpu))


def summary(*operators: SimpleNamespace, spilled: int = 0) -> SimpleNamespace:
    read = SimpleNamespace(parents=[], operators_stats=[operator("ReadParquet", 1.0, 1.0)])
    return SimpleNamespace(parents=[read], operators_stats=list(operators), dataset_bytes_spilled=spilled)


@pytest.mark.parametrize(
    ("name", "cpu", "slots", "advice"),
    [
        (PREPARE, 80, Slots(2), "computes on CPUs: more CPUs would"),
        (PREPARE, 10, Slots(2), "more fetches"),
        (ENCODE, 80, Slots(2, actors=True), "more CPUs, or a GPU"),
        (ENCODE, 10, Slots(2, actors=True), "for a service"),
        (ENCODE, 10, Slots(1, actors=True, gpus=1), "resources.gpus: 0.5"),
        (ENCODE, 90, Slots(1, actors=True, gpus=1), "resources.gpus: 0.5"),
    ],
)
def test_the_slowest_stage_is_named_with_what_would_speed_it_up(name, cpu, slots, advice):
    said = lines(summary(operator(name, 90, cpu)), {name: slots}, peak_bytes=2 * 10**9)
    assert said[0].startswith(f"slowest stage: {plain(name)} (90 s of work, {slots.most} at once)") and advice in said[0]
    assert said[-1] == "peak memory on this machine: 2.0 GB"


def test_one_busy_gpu_is_slower_than_many_readers_that_work_longer_together():
    slots = {PREPARE: Slots(16), ENCODE: Slots(1, actors=True, gpus=1)}
    for encodes, slowest in ((100, "EncodeImages"), (10, "step, write")):
        found = lines(summary(operator(PREPARE, 800, 700), operator(ENCODE, encodes, encodes)), slots, 1)[0]
        assert found.startswith(f"slowest stage: {slowest}")
    assert "more CPUs a GPU" in found


def test_spilling_is_said_and_nothing_is_said_of_a_job_that_had_nothing_to_do():
    assert any("spilled to disk: 3.0 GB" in line for line in lines(summary(spilled=3 * 10**9), {}, 1))
    nothing = SimpleNamespace(parents=[], operators_stats=[], dataset_bytes_spilled=0)
    assert stages(nothing, {}) == [] and len(lines(nothing, {}, 1)) == 1


def test_memory_counts_this_process_and_what_it_started(monkeypatch):
    before = memory()
    with mmap(-1, 64 * 2**20, flags=MAP_PRIVATE | MAP_ANONYMOUS) as block:  # no memory that was freed before, and kept
        block.write(b"x" * len(block))
        assert memory() - before > 0.9 * len(block)
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")  # whose workers it did not start
    assert lines(summary(), {}, 10**9)[-1].startswith("peak memory of this process; that of its workers is the cluster's")


def test_a_timeline_that_ray_kept_nothing_for_is_said_to_be_empty(monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "timeline", list)
    assert "no record" in speed.draw(summary(), {}, place(tmp_path))[0]
    assert json.loads((tmp_path / "timeline.json").read_text()) == []


# -- what waits, and what cannot go on -----------------------------------------------------------------------------------------


class Operator(SimpleNamespace):
    """What is asked of one of Ray's."""

    __hash__ = object.__hash__


def stage(name: str, cpu: float, gpu: float = 0, tasks: int = 0, late: int = 0) -> Operator:
    return Operator(
        name=name,
        num_active_tasks=lambda: tasks,
        get_actor_info=lambda: SimpleNamespace(running=0, pending=late, restarting=0),
        get_autoscaling_actor_pools=lambda: [1] * (late > 0),
        min_scheduling_resources=lambda: SimpleNamespace(cpu=cpu, gpu=gpu),
        metrics=SimpleNamespace(row_outputs_taken=5, num_tasks_failed=0),
    )


def with_blocks(stages: dict[Operator, int]) -> dict:
    """With the blocks that wait for each."""
    return {op: SimpleNamespace(total_enqueued_input_blocks=lambda n=n: n) for op, n in stages.items()}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            {stage("ReadParquet", 0.25, tasks=1): 3, stage(ENCODE, 1, 1, late=2): 4, stage("Write", 0.25): 0},
            "EncodeImages waits for 2 of its processes to start, each with 1 CPU (1.5 free) and 1 GPU (0 free)",
        ),
        (
            {stage("ReadParquet", 0.25): 3, stage(PREPARE, 2): 2},
            "step, write has 2 blocks of rows to do and starts none, each with 2 CPU (1.5 free)",
        ),
        ({stage("ReadParquet", 0.25, tasks=1): 3, stage(PREPARE, 1): 0}, "read is at work on 1 blocks of rows"),
    ],
)  # fmt: skip
def test_where_no_row_comes_for_minutes_a_line_says_which_stage_waits_for_what(monkeypatch, capsys, stages, said):
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.5})
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])
    executor, one = SimpleNamespace(_topology=with_blocks(stages)), Watch()
    one.before_execution_starts(executor)
    for clock[0] in (1, 2, 170, 190, 200, 350, 380):
        one.on_execution_step(executor)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"no row for 3 minutes: {said}") and second.startswith("no row for 6 minutes")


def test_a_pool_of_gpus_that_are_not_there_is_refused_where_none_will_come(local_ray, monkeypatch):
    with pytest.raises(CxrayError, match=r"^resources.gpus: an encoder is to have 1 GPUs, and this machine has 0"):
        encoder_pool(EncoderResources(gpus=1), 1000)
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    assert encoder_pool(EncoderResources(gpus=1), 1000)["num_gpus"] == 1
    most = encoder_pool(EncoderResources(actors=100), 1000)["compute"].max_size
    assert most <= ray.cluster_resources()["CPU"], "so many that nothing is left to read with"


def test_a_second_encoder_starts_where_it_is_worth_its_start(local_ray):
    assert [encoder_pool(EncoderResources(), rows)["compute"].max_size for rows in (0, 127, 128, 10_000)] == [1, 1, 2, 2]
