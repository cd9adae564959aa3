"""What the tests share: one local Ray a session, and the small real data where it is there."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulator import answering, bucket, store  # noqa: F401 - fixtures
from faulty import faulty  # noqa: F401 - a fixture
from served import service  # noqa: F401 - a fixture

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how soon Ray Train sees that its workers are done; by default 2 s
# Ray ends a worker that is idle for a second, and the next test starts another, which loads everything anew: half a minute in a hundred.
os.environ.setdefault("RAY_num_workers_soft_limit", "8")
os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network
for name in ("CXRAY_ROOT", "CXRAY_OUT", "CXRAY_BILLING_PROJECT", "RAY_ADDRESS"):
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for Ray's workers, which run steps that tests define


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data, beside the checkout or where CXRAY_SHARED_DATA says."""
    folder = Path(os.environ.get("CXRAY_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the small real data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two CPUs for the whole session, whatever the machine has: what holds there holds on a laptop."""
    import ray

    from pipelines.cluster import connect

    with pytest.MonkeyPatch.context() as only_here:
        only_here.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2}')
        connect()
    assert ray.cluster_resources()["CPU"] == 2
    yield
    ray.shutdown()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes the session's Ray is of the tier `ray`, without having to say so. Those of the service come last, for it leaves
    the others little of that Ray; the scan for what leaked comes after all of them. A soak takes as long as it takes."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(0))
    items.sort(key=lambda item: ("service" in getattr(item, "fixturenames", ()), item.path.name == "test_serve_leaks.py"))
