"""What a job says of its own time and memory."""

from types import SimpleNamespace

import pytest

from pipelines.speed import lines, memory, plain, stages


def operator(name: str, wall: float, cpu: float) -> SimpleNamespace:
    return SimpleNamespace(operator_name=name, wall_time=SimpleNamespace(sum=wall), cpu_time=SimpleNamespace(sum=cpu))


def summary(*operators: SimpleNamespace, spilled: int = 0) -> SimpleNamespace:
    read = SimpleNamespace(parents=[], operators_stats=[operator("ReadParquet", 1.0, 1.0)])
    return SimpleNamespace(parents=[read], operators_stats=list(operators), dataset_bytes_spilled=spilled)


@pytest.mark.parametrize(
    ("name", "wall", "cpu", "advice"),
    [
        ("MapBatches(step)->Write", 90, 80, "more CPUs"),
        ("MapBatches(step)->Write", 90, 10, "more fetches"),
        ("MapBatches(EncodeImages)", 90, 80, "more CPUs, or a GPU"),
        ("MapBatches(EncodeImages)", 90, 10, "another GPU"),
    ],
)
def test_the_slowest_stage_is_named_with_what_would_speed_it_up(name, wall, cpu, advice):
    said = lines(summary(operator(name, wall, cpu)), peak_bytes=2 * 10**9)
    assert said[0].startswith(f"slowest stage: {plain(name)} (99% of the work)") and advice in said[0]
    assert said[-1] == "peak memory on this machine: 2.0 GB"


def test_spilling_is_said_and_nothing_is_said_of_a_job_that_had_nothing_to_do():
    assert any("spilled to disk: 3.0 GB" in line for line in lines(summary(spilled=3 * 10**9), 1))
    nothing = SimpleNamespace(parents=[], operators_stats=[], dataset_bytes_spilled=0)
    assert stages(nothing) == [] and len(lines(nothing, 1)) == 1


def test_memory_counts_this_process_and_what_it_started():
    before = memory()
    block = bytearray(64 * 2**20)
    assert memory() - before > 0.9 * len(block)
