"""Writing a checkpoint's files in a forked process while training goes on.

megatron's asynchronous save prepares everything (plan, copies in host memory) and forks a child
that only writes. The child's results come back through anonymous memory instead of megatron's
manager process, which costs seconds to start and would outlive a killed run.
"""

import ctypes
import os
import pickle
import queue
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from samba_megatron.checkpoint.manifest import file_checksum

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in <sys/prctl.h>


class WriteResults:
    """A queue for the results of one write at a time, shared with a forked child.

    megatron puts a dict {worker: [WriteResult]} (or an exception) when all files of this rank are
    on disk, and gets it in the parent when the child has ended.
    """

    def __init__(self) -> None:
        self._memory = os.memfd_create("checkpoint-write-results")
        self.clear()

    def clear(self, folder: Path | None = None) -> None:
        """Forgets an earlier write; the next is into ``folder`` (None: unknown, no checksums)."""
        os.ftruncate(self._memory, 0)
        self._folder = folder
        self._started = time.monotonic()
        self.seconds = 0.0
        self.common_state: Any = None
        self.checksums: dict[str, str] = {}

    def start_clock(self) -> None:
        """Called where the writing begins."""
        self._started = time.monotonic()

    def put(self, results: Any) -> None:
        """Called where the writing has ended: reads the files once more, for their checksums."""
        folder, names = self._folder, _files(results)
        checksums = {name: file_checksum(folder / name) for name in names} if folder else {}
        data = pickle.dumps((time.monotonic() - self._started, checksums, results))
        written = 0
        while written < len(data):
            written += os.pwrite(self._memory, data[written:], written)

    def get_nowait(self) -> Any:
        """What was put, once.

        Raises:
            queue.Empty: if nothing was: the child died before it was done.
        """
        size = os.fstat(self._memory).st_size
        if size == 0:
            raise queue.Empty
        with os.fdopen(os.dup(self._memory), "rb") as file:
            file.seek(0)
            self.seconds, self.checksums, results = pickle.load(file)
        os.ftruncate(self._memory, 0)
        self.common_state = _find_common_state(results)
        return results


def _files(results: Any) -> set[str]:
    """Names of the files that this rank wrote."""
    if not isinstance(results, dict):
        return set()
    return {result.storage_data.relative_path for worker in results.values() for result in worker}


def _find_common_state(results: Any) -> Any:
    """Where the common state lies (torch's _StorageInfo), on the rank that wrote it."""
    if isinstance(results, dict):
        for worker in results.values():
            for result in worker:
                if result.index.fqn.startswith("common_state/"):
                    return result.storage_data
    return None


def install_results(results: WriteResults) -> None:
    """Makes megatron use ``results`` for the writes that it prepares from now on."""
    cast(Any, filesystem_async)._results_queue = results
    # Its advice, another package for asynchronous saving, is not the user's to follow.
    cast(Any, torch_strategies)._logged_mcore_async_deprecation = True


def in_background(request: AsyncRequest, results: WriteResults) -> AsyncRequest:
    """``request``, with its writing made fit for a forked child."""
    if request.async_fn is None:
        return request
    child = partial(_write_in_child, os.getpid(), request.async_fn, results)
    return request._replace(async_fn=child)


def _write_in_child(
    parent: int, write: Callable[..., None], results: WriteResults, *args: Any
) -> None:
    _die_with(parent)
    # The run's signals are the parent's business: it saves, or ends, and the child with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    results.start_clock()
    write(*args)


def _die_with(parent: int) -> None:
    """A writer whose run was killed must not go on filling the disk."""
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
