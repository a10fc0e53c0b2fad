"""Shipping to a real MLflow: every step once, whoever is killed, and in which moment."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.tracking import shipping
from samba_megatron.tracking.metrics import MetricsFile
from samba_megatron.tracking.mlflow_sink import MlflowSink
from samba_megatron.tracking.sink import SinkUnavailable
from tests.distributed.toy import ROOT, losses, toy_config, write_dataset
from tests.ranks import free_port

CONFIG = {"model": {"hidden_size": 64}, "data": {"data_path": ["a", "b"]}}


class Server:
    """An MLflow tracking server over one database file, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.database = f"sqlite:///{folder / 'mlflow.db'}"
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.database]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.folder / "server.log", "a") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        """All its processes, without warning."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Not started yet."""
    server = Server(tmp_path)
    yield server
    server.kill()


def write_steps(metrics: MetricsFile, first: int, last: int) -> None:
    """Training records as the loop writes them."""
    for step in range(first, last + 1):
        metrics.write("train", step=step, loss=1 / step, lr=1e-3, seconds={"step": 0.5})


def history(uri: str, run_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of all points of a metric at the service."""
    from mlflow import MlflowClient

    run = json.loads((run_dir / shipping.STATE_NAME).read_text())["run"]["run_id"]
    points = MlflowClient(tracking_uri=uri).get_metric_history(run, name)
    return sorted((point.step, point.value) for point in points)


def ship(run_dir: Path, uri: str, **kwargs: Any) -> "subprocess.Popen[str]":
    """The command by hand."""
    command = [sys.executable, "-m", "samba_megatron.tracking.shipping", str(run_dir)]
    return subprocess.Popen(
        [*command, "--tracking-uri", uri, *kwargs.pop("options", [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


@pytest.mark.timeout(600)
def test_nothing_is_lost_or_doubled_when_server_and_shipper_are_killed(
    server: Server, tmp_path: Path
) -> None:
    """The server dies in the middle, the shipper dies while it waits, both come back.

    The first shipper of all died before it could note which run the server had made for it.
    """
    run_dir = tmp_path / "run"
    metrics = MetricsFile(run_dir)
    metrics.write("start", step=0, config=CONFIG, layout={"world_size": 8}, parameters=3)
    write_steps(metrics, 1, 40)
    server.start()
    (run_dir / shipping.STATE_NAME).write_text('{"identity": "7f3a", "last": {}}')
    orphan = MlflowSink(server.uri, "samba", "run").open({}, {}, "7f3a")
    first = shipping.start(run_dir, server.uri, "samba", "run")
    try:
        wait_for(run_dir, "train/", 40)
        server.kill()
        write_steps(metrics, 41, 80)
        wait_until(lambda: "not reached" in (run_dir / shipping.LOG_NAME).read_text())
    finally:
        first.kill()
        first.wait()
    # A resumed run does some steps again, and goes on.
    write_steps(metrics, 71, 100)
    metrics.write("validation", step=100, sequence_length=64, loss=0.5, perplexity=1.6)
    metrics.write("end", step=100, exit_code=0, reason="done")
    metrics.close()
    server.start()
    again = ship(run_dir, server.uri)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    steps = history(server.uri, run_dir, "train/loss")
    assert steps == [(step, 1 / step) for step in range(1, 101)]
    assert history(server.uri, run_dir, "validation/64/loss") == [(100, 0.5)]
    assert len(history(server.uri, run_dir, "train/seconds.step")) == 100
    check_description(server.uri, run_dir)
    assert runs_of(server.uri, orphan["experiment_id"]) == [orphan["run_id"]]


def runs_of(uri: str, experiment: str) -> list[str]:
    """Ids of all runs of an experiment."""
    from mlflow import MlflowClient

    return [run.info.run_id for run in MlflowClient(tracking_uri=uri).search_runs([experiment])]


def check_description(uri: str, run_dir: Path) -> None:
    """Parameters by dotted names, and the run is over."""
    from mlflow import MlflowClient

    state = json.loads((run_dir / shipping.STATE_NAME).read_text())
    run = MlflowClient(tracking_uri=uri).get_run(state["run"]["run_id"])
    assert run.data.params["model.hidden_size"] == "64"
    assert run.data.params["layout.world_size"] == "8"
    assert run.info.status == "FINISHED"


def wait_until(true: Any) -> None:
    """Four minutes at most."""
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for(run_dir: Path, series: str, step: int) -> None:
    """Until a step was sent."""
    path = run_dir / shipping.STATE_NAME

    def sent() -> bool:
        return path.exists() and json.loads(path.read_text())["last"].get(series) == step

    wait_until(sent)


class LostSink:
    """Takes the call, and is not heard of again."""

    def __init__(self, state: Path) -> None:
        self._state, self.identities = state, list[str]()

    def open(self, state: dict[str, Any], tags: dict[str, str], identity: str) -> dict[str, Any]:
        assert json.loads(self._state.read_text())["identity"] == identity
        self.identities.append(identity)
        raise SinkUnavailable("the answer is lost")

    def parameters(self, values: dict[str, Any]) -> None: ...

    def metrics(self, records: Any) -> None: ...

    def close(self, exit_code: int) -> None: ...


def test_the_identity_is_on_the_disk_before_the_service_hears_of_it(tmp_path: Path) -> None:
    """And it is the same after a restart."""
    sink = LostSink(tmp_path / "other.json")
    for _ in range(2):
        shipper = shipping.Shipper(tmp_path, sink, lambda text: None, "other.json")
        assert not shipper.open({}, until=lambda: 0.0)
    assert len(sink.identities) == 2 and len(set(sink.identities)) == 1


@pytest.mark.timeout(120)
def test_sent_again_is_held_once(tmp_path: Path) -> None:
    """Killed between sending and noting it: the state file is an old one."""
    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    metrics = MetricsFile(run_dir)
    write_steps(metrics, 1, 20)
    done = ship(run_dir, uri)
    output, _ = done.communicate(timeout=100)
    assert done.returncode == 0, output[-3000:]
    state = run_dir / shipping.STATE_NAME
    old = json.loads(state.read_text()) | {"offset": 0, "last": {}}
    state.write_text(json.dumps(old))
    assert ship(run_dir, uri).wait(timeout=100) == 0
    assert history(uri, run_dir, "train/loss") == [(step, 1 / step) for step in range(1, 21)]


@pytest.mark.timeout(300)
def test_a_service_that_is_away_is_one_sentence(tmp_path: Path) -> None:
    """By hand, with little patience: what is not sent is named, and the remedy."""
    metrics = MetricsFile(tmp_path)
    write_steps(metrics, 1, 2)
    uri = f"http://127.0.0.1:{free_port()}"
    tried = ship(tmp_path, uri, options=["--patience", "0"])
    output, _ = tried.communicate(timeout=240)
    assert tried.returncode == 2
    assert f"error: {uri} was not reached" in output and "Traceback" not in output


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    """One sentence."""
    tried = ship(tmp_path, "sqlite://")
    output, _ = tried.communicate(timeout=240)
    assert tried.returncode == 2 and "has no metrics.jsonl" in output


@pytest.mark.timeout(300)
def test_a_run_and_its_resume_are_one_mlflow_run(tmp_path: Path) -> None:
    """Through the entry point, stopped after four steps and gone on with."""
    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}"
    fields = toy_config(write_dataset(tmp_path), run_dir)
    fields |= {"training.train_steps": 8, "logging.mlflow_tracking_uri": uri}
    runs = set()
    for more, code in (({"training.exit_step": 4}, 75), ({}, 0)):
        launched = [sys.executable, str(ROOT / "pretrain" / "pretrain_samba.py")]
        for name, value in {**fields, **more}.items():
            launched += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        done = subprocess.run(
            launched,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr[-3000:]
        assert ship(run_dir, uri).wait(timeout=100) == 0
        runs.add(json.loads((run_dir / shipping.STATE_NAME).read_text())["run"]["run_id"])
    assert len(runs) == 1
    assert history(uri, run_dir, "train/loss") == list(enumerate(losses(run_dir), start=1))
