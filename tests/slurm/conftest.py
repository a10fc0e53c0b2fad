"""A private Slurm for the tests; skipped where a user other than root may not run one."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, ControllerOnly


def start(cluster: Cluster) -> Cluster:
    """Starts it; where root rights lack and that is why it does not start, the test is skipped."""
    try:
        return cluster.start()
    except RuntimeError as error:
        if os.geteuid() == 0 or os.environ.get("CI"):
            raise
        pytest.skip(f"only root can run Slurm's daemons here: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four simulated nodes."""
    with start(Cluster()) as running:
        yield running


@pytest.fixture(scope="module")
def paper_cluster() -> Iterator[ControllerOnly]:
    """1,024 nodes with 8 GPUs each that exist on paper, 32 under a leaf switch."""
    with ControllerOnly().start() as running:
        yield running


@pytest.fixture(autouse=True)
def outside_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run in a job: its variables are not theirs."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SAMBA_"))]:
        monkeypatch.delenv(name)
