"""What the loop does about steps that were not taken: it notes them, and may go back.

Skipped steps leave the weights as they are, so where they come in a row the damage was done before,
by a batch that passed for normal. The run returns to a checkpoint from well before it and meets
other data from there on. A run that is killed before its next save comes back to the same place by
itself: it skips the same steps again, and returns to the same checkpoint.
"""

import dataclasses
from typing import Any

from samba_megatron.checkpoint.state import Progress
from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking.metrics import MetricsFile
from samba_megatron.training.data_parallel import whole_parameters
from samba_megatron.training.endings import RunLog
from samba_megatron.training.setup import Run, build_data, restored, samples_to_build
from samba_megatron.training.spikes import Memory, SkippedStep, SpikeGuard
from samba_megatron.training.step import NonFiniteStep


class Recovery:
    """Acts on what the guard has found; every rank calls it alike.

    Args:
        run: its state, progress and training data are replaced where it goes back.
        guard: of the run.
        log: hears of every step skipped, and of every return.
        metrics: likewise, on rank 0.
    """

    def __init__(
        self, run: Run, guard: SpikeGuard, log: RunLog, metrics: MetricsFile | None
    ) -> None:
        self._run, self._guard, self._log, self._metrics = run, guard, log, metrics

    def record(self, skipped: SkippedStep) -> None:
        """A step was not taken, and counts as done.

        Raises:
            NonFiniteStep: with code HOLD, if there were too many in the whole run.
        """
        self._guard.skipped()
        memory = self._guard.memory
        self._run.console.warn(f"step {self._log.step} is skipped: {skipped.reason}")
        self._note(
            "skipped",
            loss=skipped.loss,
            grad_norm=skipped.grad_norm,
            reason=skipped.reason,
            in_row=memory.in_row,
            skipped_steps=memory.skipped_steps,
        )
        if self._guard.is_over_budget:
            count = f"{memory.skipped_steps} steps were skipped"
            raise NonFiniteStep(ExitCode.HOLD, f"{count}, more than faults.max_skipped_steps")

    @property
    def is_wanted(self) -> bool:
        """Whether skipping did not help, and the run must go back."""
        return self._guard.wants_rollback

    def roll_back(self) -> None:
        """Restores the newest checkpoint that is older than the row of skipped steps by its length.

        The data go on where they are. The guard's memory is the checkpoint's afterwards, but for
        what has been spent of the budgets.

        Raises:
            NonFiniteStep: with code HOLD, if the budget is used up or there is no such checkpoint.
        """
        run, before, came_from = self._run, self._guard.memory, self._run.state.progress
        older = self._restore(came_from.step - 2 * before.in_row)
        position = came_from.consumed_samples
        consumed = run.train_dataset.ledger(position)
        run.state.progress = dataclasses.replace(
            restored(older, came_from), consumed_samples=position, data_consumed=consumed
        )
        self._guard.memory = Memory(**older.faults) if older.faults else Memory([], [])
        self._guard.rolled_back(before)
        samples = samples_to_build(run.config, run.length, run.state.progress)
        run.train_dataset, _ = build_data(run.config, samples, consumed)
        self._log.step, past = older.step, position - older.consumed_samples
        run.console.warn(
            f"back from step {came_from.step} to the checkpoint of step {older.step}: the {past} "
            "samples consumed since are not seen again"
        )
        rollbacks = self._guard.memory.rollbacks
        self._note("rollback", from_step=came_from.step, samples=past, rollbacks=rollbacks)

    def _restore(self, last_good: int) -> Progress:
        run, row = self._run, f"{self._guard.memory.in_row} steps in a row were skipped"
        if not self._guard.may_roll_back:
            used = f"faults.max_rollbacks {self._guard.memory.rollbacks} is used up"
            raise NonFiniteStep(ExitCode.HOLD, f"{row} and {used}")
        with whole_parameters(run.state.model, run.config.parallel.overlap_param_gather):
            older = run.store.go_back(run.state, last_good)
        if older is None:
            missing = f"there is no checkpoint of step {last_good} or before to go back to"
            raise NonFiniteStep(ExitCode.HOLD, f"{row} and {missing}")
        return older

    def _note(self, kind: str, **values: Any) -> None:
        if self._metrics is not None:
            self._metrics.write(kind, step=self._log.step, **values)
        self._log.note(kind, **values)
