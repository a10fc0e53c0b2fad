"""Runs a pipeline's tasks: processes of this machine, or an array of Slurm jobs.

Both are datatrove's executors, so completion marks, logs and statistics are the same. The local
one differs in three things: it notices a worker that was killed, its workers end with the command,
and the first failing task stops the others.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor

from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.slurm_job import active_job, is_active, note_job
from samba_megatron.data.preprocessing.workspace import release_claims
from samba_megatron.platform.errors import UserError

_PR_SET_PDEATHSIG = 1


class LocalShardExecutor(LocalPipelineExecutor):
    """datatrove's local executor over processes whose death is noticed."""

    def run(self) -> None:
        """Runs the tasks that are not complete.

        Raises:
            UserError: a task's, or a worker was killed.
        """
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        self.save_executor_as_json()
        if min(self.workers, len(ranks)) == 1:
            for rank in ranks:
                _run_quietly(self, rank)
            return
        # Forked: what this process has imported need not be again. No thread is running yet.
        context = multiprocessing.get_context("fork")
        workers = min(self.workers, len(ranks))
        pool = ProcessPoolExecutor(workers, context, _adopt, (self, os.getpid()))
        others = set(multiprocessing.active_children())
        futures: list[Future[None]] = []
        try:
            futures = [pool.submit(_run_in_worker, rank) for rank in ranks]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenizing worker died, most likely killed for lack of memory: use fewer "
                "--workers and run the same command again"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_executor: PipelineExecutor | None = None
"""What this worker process runs tasks of."""


def _adopt(executor: PipelineExecutor, parent: int) -> None:
    """Starts a worker, which ends when its parent does, however that ends."""
    global _executor
    _executor = executor
    release_claims()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _run_in_worker(rank: int) -> None:
    assert _executor is not None
    _run_quietly(_executor, rank)


def _run_quietly(executor: PipelineExecutor, rank: int) -> None:
    """Runs a task; what datatrove says of it goes to the task's log file alone."""
    pipeline = executor.pipeline
    executor.pipeline = deepcopy(pipeline)  # steps keep counts of their task
    try:
        with _silence():
            executor._run_for_rank(rank, local_rank=1)
    finally:
        executor.pipeline = pipeline


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield
        _detach_loggers()


def _detach_loggers() -> None:
    """datatrove's logger must not keep the stream that is about to be closed."""
    from loguru import logger

    logger.remove()


class SlurmShardExecutor(SlurmPipelineExecutor):
    """datatrove's Slurm executor, which is waited for."""

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        """datatrove's, without those that are left to the cluster's defaults."""
        arguments = super().get_sbatch_args(max_array)
        return {key: value for key, value in arguments.items() if value or key == "requeue"}

    def launch_merge_stats(self) -> None:
        """Statistics are summed by the command: no job is sent for it."""

    def run(self) -> None:
        """In a job of the array: does its tasks. Elsewhere: sends the array and waits for it.

        Raises:
            UserError: sbatch refuses the job.
        """
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            super().run()
            return
        _detach_loggers()
        if job := active_job(self.state_folder):
            print(f"Slurm job {job} of an earlier command is waited for", file=sys.stderr)
            self._wait_for(job)
        try:
            self.launch_job()
        except FileNotFoundError as error:
            raise UserError("there is no sbatch here: run --slurm on a cluster's login node") from (
                error
            )
        except subprocess.CalledProcessError as error:
            raise UserError("sbatch refused the job: what it said is above") from error
        if self.job_id != -1:
            print(f"Slurm job {self.job_id}, logs in {self.slurm_logs_folder}", file=sys.stderr)
            note_job(self.state_folder, str(self.job_id))
            self._wait_for(str(self.job_id))

    def _wait_for(self, job: str) -> None:
        pause = min(1.0, self.poll_seconds)
        while is_active(job):
            time.sleep(pause)
            pause = min(1.5 * pause, self.poll_seconds)

    poll_seconds = 5.0
    state_folder = Path()


def make_executor(
    options: PreprocessOptions, pipeline: list[Any], tasks: int, logging_dir: Path
) -> PipelineExecutor:
    """The executor for ``options``; its state lies in ``logging_dir``."""
    if options.slurm is None:
        return LocalShardExecutor(
            pipeline, tasks=tasks, workers=options.workers, logging_dir=str(logging_dir)
        )
    slurm = options.slurm
    executor = SlurmShardExecutor(
        pipeline,
        tasks=tasks,
        time=slurm.time,
        partition=slurm.partition or "",
        mem_per_cpu_gb=slurm.mem_per_cpu_gb,
        workers=options.workers,
        job_name=f"preprocess_{Path(options.output_prefix).name}",
        qos="",
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
        sbatch_args=dict(slurm.sbatch_args),
        logging_dir=str(logging_dir),
        slurm_logs_folder=str(logging_dir / "slurm"),
        tasks_per_job=slurm.tasks_per_job,
        mail_type="NONE",
    )
    executor.poll_seconds, executor.state_folder = slurm.poll_seconds, logging_dir
    return executor
