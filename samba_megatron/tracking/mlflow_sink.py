"""The sink for MLflow: an embedded database file by default, any tracking server by its URI."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import batched
from typing import Any

from samba_megatron.platform.errors import UserError
from samba_megatron.tracking.sink import SinkUnavailable

_BATCH = 900
"""Metrics a request: MLflow takes 1,000."""
_PARAMETERS = 90
"""Parameters a request: MLflow takes 100."""
_LONGEST = 5_000
"""Characters of a parameter's value: MLflow takes 6,000."""

_IDENTITY_TAG = "samba_megatron.identity"


class MlflowSink:
    """One run of an MLflow experiment.

    MLflow's databases keep a metric once for each (name, step, time, value), so that records which
    are sent again after a break do not double.

    Args:
        uri: ``sqlite:///PATH``, ``http://HOST:PORT``, …
        experiment: the experiment's name; made when missing.
        run_name: the run's name there.
    """

    def __init__(self, uri: str, experiment: str, run_name: str) -> None:
        # Its own retries would keep us from noticing for minutes that a server is away.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise UserError(
                "logging.mlflow_tracking_uri is set and mlflow is not installed: install the "
                "extra samba-megatron[tracking], or leave the field out"
            ) from None
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment, self._run_name = experiment, run_name
        self._run_id = ""

    def open(self, state: dict[str, Any], tags: dict[str, str], identity: str) -> dict[str, Any]:
        """Goes on with the run of ``state``, else with the one of ``identity``, or makes one."""
        with _reporting():
            if not state:
                number = self._experiment_id()
                run_id = self._find(number, identity) or self._make(number, identity)
                state = {"experiment_id": number, "run_id": run_id}
            self._run_id = str(state["run_id"])
            self._client.update_run(self._run_id, status="RUNNING")
            for name, value in tags.items():
                self._client.set_tag(self._run_id, name, value)
        return state

    def _experiment_id(self) -> str:
        experiment = self._client.get_experiment_by_name(self._experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(self._experiment))

    def _find(self, experiment_id: str, identity: str) -> str | None:
        """A run that was made by a process that did not live to note it."""
        wanted = f"tags.`{_IDENTITY_TAG}` = '{identity}'"
        found = self._client.search_runs([experiment_id], wanted, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _make(self, experiment_id: str, identity: str) -> str:
        """MLflow makes the run with its tag, or not at all."""
        run = self._client.create_run(
            experiment_id, tags={_IDENTITY_TAG: identity}, run_name=self._run_name
        )
        return str(run.info.run_id)

    def parameters(self, values: dict[str, Any]) -> None:
        """MLflow's parameters never change: what a resume changed is kept as a tag beside it."""
        from mlflow.entities import Param, RunTag

        with _reporting():
            known = self._client.get_run(self._run_id).data.params
            texts = {name: str(value)[:_LONGEST] or "''" for name, value in values.items()}
            new = [Param(name, text) for name, text in texts.items() if name not in known]
            changed = [
                RunTag(f"changed.{name}", text)
                for name, text in texts.items()
                if known.get(name, text) != text
            ]
            for some in batched(new, _PARAMETERS):
                self._client.log_batch(self._run_id, params=list(some))
            for few in batched(changed, _PARAMETERS):
                self._client.log_batch(self._run_id, tags=list(few))

    def metrics(self, records: Iterable[tuple[int, float, dict[str, float]]]) -> None:
        """Sends them in requests of the size that MLflow takes."""
        with _reporting():
            for some in batched(_metrics(records), _BATCH):
                self._client.log_batch(self._run_id, metrics=list(some))

    def close(self, exit_code: int) -> None:
        """Finished, failed, or (to be started again) still running for MLflow."""
        from samba_megatron.platform.exits import ExitCode

        if exit_code == ExitCode.REQUEUE:
            return
        with _reporting():
            status = "FINISHED" if exit_code == ExitCode.DONE else "FAILED"
            self._client.set_terminated(self._run_id, status=status)


def _metrics(records: Iterable[tuple[int, float, dict[str, float]]]) -> Iterator[Any]:
    from mlflow.entities import Metric

    for step, seconds, values in records:
        for name, value in values.items():
            yield Metric(name, value, int(1000 * seconds), step)


@contextmanager
def _reporting() -> Iterator[None]:
    """Whatever MLflow or the network says becomes :class:`SinkUnavailable`: nothing is lost."""
    try:
        yield
    except Exception as error:
        raise SinkUnavailable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
