"""What the training loop calls: save, poll, wait, load.

Saving stops the loop only while the optimizer's shards are gathered and copied to host memory; a
forked child writes, and a later :meth:`CheckpointStore.poll` publishes. One save is in flight at a
time: a second one waits for the first.
"""

import os
import platform
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from torch.distributed.checkpoint import CheckpointException

import samba_megatron
from samba_megatron.checkpoint import folder, manifest, match, ranks, state, writer
from samba_megatron.checkpoint.finding import Finder, SavedRun
from samba_megatron.checkpoint.manifest import Manifest
from samba_megatron.checkpoint.state import Progress, TrainState
from samba_megatron.config import CheckpointConfig
from samba_megatron.model import fp8_weights
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import ExitWith, UserError
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.files import sync

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d")


@dataclass(frozen=True)
class SaveReport:
    """What a save cost; the same on every rank, but for the stall, which is this rank's."""

    step: int
    path: Path
    """The published checkpoint."""
    bytes: int
    """Its size on disk."""
    stall_seconds: float
    """How long the loop stood still: gathering, copying to the host, forking (or writing)."""
    write_seconds: float
    """How long the slowest rank wrote."""
    commit_seconds: float
    """Checking, publishing and retention, after the last rank had written."""


@dataclass
class _Pending:
    """A save that is not yet published."""

    manifest: Manifest
    """Complete but for what only the finished files can tell."""
    writing: Path
    files: int
    """Data files that this rank writes."""
    stall_seconds: float = 0.0


class CheckpointStore:
    """The checkpoints of one run. Every rank calls every method, in the same order."""

    def __init__(self, config: CheckpointConfig, notice: Callable[[str], None] = print) -> None:
        """Removes, on rank 0, what a killed run left half-written or half-deleted.

        Args:
            config: with ``save`` and ``load`` resolved to paths or None.
            notice: gets sentences for people, on rank 0 only.
        """
        self._config = config
        self._notice = notice if ranks.rank() == 0 else _ignore
        self._folder = Path(config.save) if config.save else None
        self._finder = Finder(config)
        self._results = writer.WriteResults()
        self._queue = AsyncCallsQueue(persistent=False)
        self._strategy = _save_strategy(config)
        self._validated = False
        self._pending: _Pending | None = None
        self._reports: deque[SaveReport] = deque()
        self._newest: int | None = None
        self._parameters: int | None = None
        self._deleting: list[Thread] = []
        if self._folder is not None:
            for path in ranks.on_rank_0(lambda: folder.clean(Path(config.save or ""))):
                self._notice(f"removed {path.name}, which an interrupted run had left")

    def find(self) -> SavedRun | None:
        """The checkpoint that :meth:`load` would take, to compare configurations before a model
        is built; None for a fresh start.

        Raises:
            ExitWith: code HOLD, if there are checkpoints but none is good.
            UserError: if ``config.load`` names none.
        """
        found = self._finder.to_start_from()
        return SavedRun(found.path, found.manifest, found.corrupt) if found else None

    def load(self, train_state: TrainState) -> Progress | None:
        """Restores ``train_state`` in place from ``config.save`` or, if that has none yet, from
        ``config.load``.

        Returns:
            The progress that was saved with it; a new one at step 0 where only weights are taken
            (``config.load_weights_only``, and nothing in ``config.save``); None for a fresh start.

        Raises:
            ExitWith: as :meth:`find`.
            UserError: likewise, or if the checkpoint holds another model.
        """
        found = self._finder.to_start_from()
        if found is None:
            return None
        for notice in found.notices:
            self._notice(notice)
        resuming = found.path.parent == self._folder
        with _reading_on_rank_0(found.path):
            if self._config.load_weights_only and not resuming:
                self._load_weights(train_state, found)
                return Progress()
            progress = self._load_all(train_state, found)
        if resuming:
            self._newest = progress.step
        return progress

    def go_back(self, train_state: TrainState, last_step: int) -> Progress | None:
        """Restores ``train_state`` in place from the newest good checkpoint of this run that is of
        ``last_step`` or before, once a save that is under way is published.

        Returns:
            The progress that was saved with it; None, with nothing changed, if there is none.
        """
        self._publish_earlier(blocking=True)
        found = self._finder.before(last_step)
        if found is None:
            return None
        with _reading_on_rank_0(found.path):
            progress = self._load_all(train_state, found)
        self._newest = progress.step
        return progress

    def preflight(self, train_state: TrainState) -> None:
        """Makes sure, before hours are spent, that one checkpoint can be written.

        Raises:
            UserError: if the folder cannot be written or has no room for one.
        """
        if self._folder is not None:
            needed, target = state.estimate_bytes(train_state), self._folder
            ranks.on_rank_0(lambda: folder.require_space(target, needed))

    def save(self, train_state: TrainState, blocking: bool = False) -> SaveReport | None:
        """Saves the checkpoint of ``train_state.progress.step``, waiting first for an earlier one.

        A step that this run has published, or started from, is not saved again.

        Args:
            train_state: not to be changed before this returns.
            blocking: publish before returning, also where ``config.async_save`` is set.

        Returns:
            The report if the checkpoint is published; None if it is being written in the
            background (see :meth:`poll`) or there is nothing to do.

        Raises:
            ExitWith: code HOLD, if a weight or the optimizer's state is not finite.
            UserError: if there is no room for it or it cannot be written.
        """
        started = time.monotonic()
        self._publish_earlier(blocking=True)
        step = train_state.progress.step
        if self._folder is None or self._newest == step:
            return None
        self._refuse_non_finite(train_state)
        self.preflight(train_state)
        request = self._prepare(train_state, self._folder)
        assert self._pending is not None
        if blocking or not self._config.async_save:
            return self._write_now(request, started)
        self._queue.schedule_async_request(writer.in_background(request, self._results))
        self._pending.stall_seconds = time.monotonic() - started
        return None

    def poll(self) -> SaveReport | None:
        """Publishes the background save if every rank has finished writing; call it every step.

        Returns:
            The report, once.

        Raises:
            UserError: if it could not be written.
        """
        return self._finalize(blocking=False)

    def wait(self) -> SaveReport | None:
        """As :meth:`poll`, but waits for the writing to end."""
        return self._finalize(blocking=True)

    def close(self) -> None:
        """Waits for everything, deletions too; call it before the process groups go."""
        self.wait()
        for thread in self._deleting:
            thread.join()
        self._deleting.clear()

    # Finding and loading

    def _load_weights(self, train_state: TrainState, found: folder.Found) -> None:
        template = state.assemble_weights(train_state)
        fp8_weights.make_room(template)
        state.apply_weights_alone(train_state, self._read(template, train_state, found))

    def _load_all(self, train_state: TrainState, found: folder.Found) -> Progress:
        if found.path.parent == self._folder:
            # Delayed scaling's FP8 state is a pickle, which Transformer Engine loads only from a
            # checkpoint that is said to be trusted: this run's own is.
            os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
        same_layout = found.manifest.layout == state.layout()
        if not same_layout:
            self._notice(
                f"checkpoint {found.path} was saved in another layout "
                f"({_layout_text(found.manifest.layout)}): random generators start from their seeds"
            )
        template = state.assemble(
            train_state,
            loading=True,
            same_layout=same_layout,
            rerun_pending=found.manifest.rerun_pending and same_layout,
        )
        return state.apply(train_state, self._read(template, train_state, found))

    def _read(
        self, template: dict[str, Any], train_state: TrainState, found: folder.Found
    ) -> dict[str, Any]:
        parameters = self._count_parameters(train_state)
        try:
            template, dropped = match.drop_absent_extra_state(template, found.path)
            match.check_parameters(found.path, found.manifest, parameters)
        except UserError as error:
            differences = match.model_differences(
                found.manifest.config, train_state.progress.config
            )
            raise UserError("; ".join([str(error), *differences])) from None
        if dropped:
            self._notice(
                f"checkpoint {found.path} has no state of Transformer Engine's modules: theirs "
                "starts anew"
            )
        with warnings.catch_warnings():
            # torch takes megatron's way of reading, each rank for itself, for a mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            warnings.filterwarnings("ignore", message="The argument order of load")
            loaded: dict[str, Any] = dist_checkpointing.load(
                template, str(found.path), _load_strategy(self._config)
            )
        return loaded

    # Saving

    def _refuse_non_finite(self, train_state: TrainState) -> None:
        if not state.is_finite(train_state):
            kept = ranks.on_rank_0(lambda: folder.read_latest(self._folder or Path()))
            raise ExitWith(
                ExitCode.HOLD,
                "weights or optimizer state are not finite after step "
                f"{train_state.progress.step}: nothing was saved; the last checkpoint is "
                f"{kept or 'none'}",
            )

    def _prepare(self, train_state: TrainState, target: Path) -> AsyncRequest:
        """Plans the save and makes ``self._pending``; the request is yet to be executed."""
        step = train_state.progress.step
        parameters = self._count_parameters(train_state)
        writing = ranks.on_rank_0(lambda: folder.begin(target, step))
        content = state.assemble(train_state)
        self._results.clear(writing)
        writer.install_results(self._results)
        request = dist_checkpointing.save(
            content,
            str(writing),
            self._strategy,
            validate_access_integrity=not self._validated,
            async_sharded_save=True,
            async_strategy="mcore",
            preprocess_common_before_consistancy_check=_same_on_all_ranks,
            content_metadata={
                name: value for name, value in state.content_metadata().items() if name[:3] != "dp_"
            },
        )
        assert request is not None
        self._validated = True
        self._pending = _Pending(
            manifest=_manifest(train_state.progress, parameters),
            writing=writing,
            files=len(request.async_fn_args[1]) if request.async_fn else 0,
        )
        request.add_finalize_fn(self._commit)
        return request

    def _write_now(self, request: AsyncRequest, started: float) -> SaveReport:
        self._results.start_clock()
        self._guarded(request.execute_sync)
        return replace(self._reports.pop(), stall_seconds=time.monotonic() - started)

    def _finalize(self, blocking: bool) -> SaveReport | None:
        self._publish_earlier(blocking)
        return self._reports.popleft() if self._reports else None

    def _publish_earlier(self, blocking: bool) -> None:
        if self._pending is not None:
            self._guarded(lambda: self._queue.maybe_finalize_async_calls(blocking=blocking))

    def _guarded(self, write: Callable[[], object]) -> None:
        """Runs ``write``; a failure to write becomes one sentence, and nothing is published."""
        assert self._pending is not None
        pending = self._pending
        try:
            write()
        except (CheckpointException, OSError) as error:
            self._pending = None
            target = pending.writing.parent
            cause = _cause(error, target)
            if ranks.rank() == 0:
                folder.remove(pending.writing)
            raise UserError(
                f"the checkpoint of step {pending.manifest.step} could not be written to "
                f"{target} ({cause}): check space, quota and permissions; earlier checkpoints are "
                "whole"
            ) from error

    def _commit(self) -> None:
        """Checks and publishes what every rank has written; runs on every rank."""
        started, pending = time.monotonic(), self._pending
        assert pending is not None and self._folder is not None
        files, seconds = ranks.total(pending.files), ranks.largest(self._results.seconds)
        for checksums in ranks.gathered(self._results.checksums):
            pending.manifest.checksums |= checksums
        path, size, aside = ranks.on_rank_0(lambda: self._publish(pending, int(files)))
        self._remove_in_background(aside)
        self._finder.forget(path)
        self._pending, self._newest = None, pending.manifest.step
        self._reports.append(
            SaveReport(
                step=pending.manifest.step,
                path=path,
                bytes=size,
                stall_seconds=pending.stall_seconds,
                write_seconds=seconds,
                commit_seconds=time.monotonic() - started,
            )
        )

    def _publish(self, pending: _Pending, files: int) -> tuple[Path, int, list[Path]]:
        """On rank 0: manifest, rename, ``latest``, retention."""
        writing, content = pending.writing, pending.manifest
        content.files = manifest.file_sizes(writing)
        found = sum(name.endswith(".distcp") for name in content.files)
        if found != files:
            raise UserError(
                f"{files} files were written into {writing} but {found} are seen there: put "
                "checkpoint.save on a file system that all nodes share"
            )
        sync(writing / "metadata.json")  # the one file that megatron does not
        content.metadata_sha256 = manifest.file_hash(writing / manifest.METADATA)
        content.common_state = self._common_state(writing)
        manifest.write_manifest(writing, content)
        path, replaced = folder.publish(writing)
        aside = folder.retire(path.parent, self._config.keep_last, self._config.milestone_interval)
        return path, content.bytes, aside + ([replaced] if replaced else [])

    def _common_state(self, writing: Path) -> manifest.Slice | None:
        info = self._results.common_state
        if info is None:
            return None
        digest = manifest.file_hash(writing / info.relative_path, info.offset, info.length)
        return manifest.Slice(info.relative_path, info.offset, info.length, digest)

    def _remove_in_background(self, paths: list[Path]) -> None:
        """Deletes, on rank 0, in a thread: thousands of files take a while on a shared disk."""
        if paths and ranks.rank() == 0:
            thread = Thread(target=folder.remove, args=paths, daemon=True)
            thread.start()
            self._deleting = [*(t for t in self._deleting if t.is_alive()), thread]

    def _count_parameters(self, train_state: TrainState) -> int:
        if self._parameters is None:
            self._parameters = state.count_parameters(state.assemble_weights(train_state))
        return self._parameters


def _save_strategy(config: CheckpointConfig) -> Any:
    strategy = TorchDistSaveShardedStrategy()
    group = distributed.process_groups().dp_cp
    if config.fully_parallel_save and group.size() > 1:
        return FullyParallelSaveStrategyWrapper(strategy, group, do_cache_distribution=True)
    return strategy


def _load_strategy(config: CheckpointConfig) -> Any:
    strategy = TorchDistLoadShardedStrategy()
    group = distributed.process_groups().dp_cp
    if config.fully_parallel_load and group.size() > 1:
        return FullyParallelLoadStrategyWrapper(strategy, group)
    return strategy


def _manifest(progress: Progress, parameters: int) -> Manifest:
    return Manifest(
        step=progress.step,
        consumed_samples=progress.consumed_samples,
        consumed_tokens=progress.consumed_tokens,
        parameters=parameters,
        layout=state.layout(),
        versions=_versions(),
        config=progress.config,
        config_sha256=manifest.config_hash(progress.config),
        data_identity=progress.data_identity,
        data_consumed=progress.data_consumed,
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        rerun_pending=state.rerun_is_pending(),
        metadata_sha256="",
        common_state=None,
    )


def _versions() -> dict[str, str]:
    versions = {"samba-megatron": samba_megatron.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _same_on_all_ranks(common: dict[str, Any]) -> dict[str, Any]:
    """The common state without what differs by pipeline stage and is restored on none of them."""
    return {name: value for name, value in common.items() if name != "optimizer"}


def _cause(error: BaseException, target: Path) -> str:
    """What failed, the same on every rank; what exactly, the writer has said on its stderr."""
    if not isinstance(error, CheckpointException):
        return str(error)
    failed = ", ".join(str(rank) for rank in sorted(error.failures))
    return ranks.on_rank_0(
        lambda: (
            f"the writer of rank {failed} failed; "
            f"{shutil.disk_usage(target).free / 1e9:.2f} GB are free there"
        )
    )


def _layout_text(layout: dict[str, int | None]) -> str:
    return ", ".join(f"{name} {size}" for name, size in layout.items() if size is not None)


def _reading_on_rank_0(path: Path) -> Any:
    return folder.reading(path) if ranks.rank() == 0 else nullcontext()


def _ignore(text: str) -> None:
    """No notice on ranks other than 0."""
