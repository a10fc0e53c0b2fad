"""Runs on a real Slurm: ended by it again and again, and equal in the end to undisturbed ones.

The runs start when the first test asks, three at a time, since much of their time is waiting; each
test then looks at one of them.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.distributed.toy import launch, losses, toy_config, write_dataset
from tests.slurm import scenarios
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import start
from tests.slurm.training import RANKS_PER_NODE, JobRun

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


class Scenario(NamedTuple):
    """What a test looks at."""

    live: Callable[[Cluster, Path, str], JobRun]
    requeue_exit: bool = True
    """Whether the site requeues code 75 by itself."""


SCENARIOS = {
    "test_time_limit_preemption_and_a_lost_node": Scenario(scenarios.many_ends),
    "test_a_bad_node_is_excluded_and_a_hang_survived": Scenario(
        scenarios.bad_node_then_hang, requeue_exit=False
    ),
    "test_a_limit_that_comes_before_the_save": Scenario(scenarios.overtime),
    "test_a_persons_stop_then_a_damaged_checkpoint": Scenario(scenarios.stop_and_corrupt),
    "test_a_chain_of_jobs": Scenario(scenarios.chain, requeue_exit=False),
    "test_a_job_of_a_chain_does_not_train_on_a_bad_node": Scenario(
        scenarios.bad_node_in_a_chain, requeue_exit=False
    ),
    "test_scancel_saves": Scenario(scenarios.cancelled),
    "test_a_broken_rank_ends_all_and_a_crash_loop_is_held": Scenario(scenarios.broken_rank),
    "test_a_mistake_in_the_recipe_is_held_at_once": Scenario(scenarios.broken_recipe),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte tokens of real text."""
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def lives(
    request: pytest.FixtureRequest, prefix: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[JobRun]"]]:
    """The runs of the tests that were asked for, on their way."""
    folder = tmp_path_factory.mktemp("runs")

    def live(name: str) -> JobRun:
        scenario = SCENARIOS[name]
        where = folder / scenario.live.__name__
        where.mkdir()
        with start(Cluster(requeue_exit=scenario.requeue_exit)) as cluster:
            return scenario.live(cluster, where / "run", prefix)

    wanted = {item.name for item in request.session.items}
    pool = ThreadPoolExecutor(max_workers=3)
    yield {name: pool.submit(live, name) for name in SCENARIOS if name in wanted}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def run(request: pytest.FixtureRequest, lives: dict[str, "Future[JobRun]"]) -> JobRun:
    """The run of this test, at its end."""
    return lives[request.node.name].result()


@pytest.fixture(scope="module")
def undisturbed(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """Losses without any fault, by the number of steps: 4 ranks for the many, 2 for the few."""
    folder = tmp_path_factory.mktemp("undisturbed")
    found = {}
    for nodes, steps in ((2, scenarios.MANY_STEPS), (1, scenarios.FEW_STEPS)):
        config = toy_config(prefix, folder / str(steps), **{"training.train_steps": steps})
        launch(nodes * RANKS_PER_NODE, [{"name": "undisturbed", "config": config}], folder)
        found[steps] = losses(folder / str(steps))
        assert len(found[steps]) == steps
    return found


def assert_survived(
    run: JobRun, undisturbed: dict[int, list[float]], steps: int, *causes: str
) -> None:
    """The jobs ended by these causes and came back each time, until the run was done.

    Every loss is that of the undisturbed run, to the last bit.
    """
    ends = [(cause, "stop" if cause == "user stop" else "requeue") for cause in causes]
    assert run.ends() == [*ends, ("done", "done")], run.report()
    assert list(run.losses().values()) == undisturbed[steps], run.report()


def test_time_limit_preemption_and_a_lost_node(
    run: JobRun, undisturbed: dict[int, list[float]]
) -> None:
    """Each is known by its name; the run goes on as the same job, and comes to the same losses."""
    causes = "time limit", "preempted", "node failure"
    assert_survived(run, undisturbed, scenarios.MANY_STEPS, *causes)
    starts = run.events("job_start")
    assert {record["job"] for record in starts} == set(run.jobs)
    assert [record.get("restart", 0) for record in starts] == [0, 1, 2, 3]
    assert run.notes["killed"] not in starts[-1]["nodes"]
    # The first two ends saved what had been done; the third could not.
    ends = run.events("job_end")
    assert ends[0]["checkpoint"] == run.events("end")[0]["step"]
    assert ends[1]["checkpoint"] == run.events("end")[1]["step"]
    log = (run.folder / "logs" / f"job_{run.jobs[0]}.log").read_text()
    assert log.count("[job] start") == 4, "one log for all starts"


def test_a_bad_node_is_excluded_and_a_hang_survived(
    run: JobRun, undisturbed: dict[int, list[float]]
) -> None:
    """The site requeues nothing by itself: the job does, and keeps off the node."""
    assert_survived(run, undisturbed, scenarios.MANY_STEPS, "bad node", "hang")
    assert list(run.events("bad_nodes")[0]["nodes"]) == ["n1"]
    starts = run.events("job_start")
    assert "n1" in starts[0]["nodes"]
    assert all("n1" not in start["nodes"] for start in starts[1:])
    (report,) = (run.folder / "node_checks").glob("*.0.before/n1.json")
    assert not json.loads(report.read_text())["ok"]
    across = [json.loads(p.read_text()) for p in run.folder.glob("node_checks/*/across.json")]
    assert across and all(found["all_reduce_gb_per_s"] > 0 for found in across)
    assert "rank 2 on n3" in run.events("job_end")[1]["reason"]
    assert list((run.folder / "node_checks").glob("*.after/n3.json")), "checked after the hang"


def test_a_persons_stop_then_a_damaged_checkpoint(
    run: JobRun, undisturbed: dict[int, list[float]]
) -> None:
    """The stop is not undone by Slurm; the next submission goes further back, and says why."""
    assert_survived(run, undisturbed, scenarios.FEW_STEPS, "user stop")
    stopped = run.events("job_end")[0]["checkpoint"]
    assert run.events("start")[1]["step"] < stopped
    assert f"step_{stopped:07d} is corrupt" in (run.folder / "log.txt").read_text()


def test_a_chain_of_jobs(run: JobRun, undisturbed: dict[int, list[float]]) -> None:
    """The second goes on where the first stopped; the third is not needed and taken away."""
    assert_survived(run, undisturbed, scenarios.FEW_STEPS, "preempted")
    assert [record["job"] for record in run.events("job_start")] == run.jobs[:2]
    assert (run.notes["first"], run.notes["last"]) == ("COMPLETED", "CANCELLED")


def test_a_job_of_a_chain_does_not_train_on_a_bad_node(
    run: JobRun, undisturbed: dict[int, list[float]]
) -> None:
    """It ends at once, and the next job keeps off the node."""
    assert_survived(run, undisturbed, scenarios.FEW_STEPS, "bad node")
    starts = run.events("job_start")
    assert [(record["job"], record["nodes"]) for record in starts] == [
        (run.jobs[0], ["n1"]),
        (run.jobs[1], ["n2"]),
    ]
    assert run.notes["first"] == "FAILED"
    assert not list(run.folder.glob(f"logs/{run.jobs[0]}.0/rank_*")), "no rank was started"


def test_a_limit_that_comes_before_the_save(
    run: JobRun, undisturbed: dict[int, list[float]]
) -> None:
    """Slurm requeues no job that it ended for its time: the job ends its ranks just before."""
    assert_survived(run, undisturbed, scenarios.FEW_STEPS, "time limit")
    assert "not saved" in run.events("job_end")[0]["reason"]
    assert {record["job"] for record in run.events("job_start")} == set(run.jobs)


def test_scancel_saves(run: JobRun) -> None:
    """Slurm's plain cancel: the ranks save before they are killed, and nothing starts again."""
    assert run.ends() == [("user stop", "stop")], run.report()
    end = run.events("job_end")[0]
    assert end["checkpoint"] == run.events("end")[0]["step"] >= 2


def test_a_broken_rank_ends_all_and_a_crash_loop_is_held(run: JobRun) -> None:
    """The reason is the broken rank's, not its peers'; two ends without a checkpoint are enough."""
    assert run.ends() == [("bug", "requeue"), ("bug", "hold")], run.report()
    # A failed rank that waits for its peers is ended after a minute: nothing waited for that.
    assert float(run.notes["seconds"]) < 55
    for end in run.events("job_end"):
        assert "rank 1 on n1: ValueError: this rank's data are broken" in end["reason"]
    (hold,) = run.events("hold")
    assert (hold["cause"], "2 ends in a row" in hold["reason"]) == ("crash loop", True)


def test_a_mistake_in_the_recipe_is_held_at_once(run: JobRun) -> None:
    """The rank that says so counts, not its peers, which srun ends with SIGTERM as Slurm would."""
    assert run.ends() == [("user error", "hold")], run.report()
    assert "data.sequence_lenght" in run.events("job_end")[0]["reason"]
