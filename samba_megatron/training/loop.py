"""The training loop: steps, validation, saving, and every way to end."""

import gc
import time
from typing import Any

from samba_megatron.data.stream import Batch
from samba_megatron.platform import distributed, hardware
from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking.metrics import MetricsFile
from samba_megatron.training.data_parallel import whole_parameters
from samba_megatron.training.evaluation import Evaluator
from samba_megatron.training.report import Rates, start_record
from samba_megatron.training.setup import Run
from samba_megatron.training.signals import StopRequest
from samba_megatron.training.step import NonFiniteStep, Stopwatch, needs_data, train_step


class Loop:
    """One process's part in a run that is set up."""

    def __init__(self, run: Run, stop: StopRequest) -> None:
        from megatron.core import parallel_state

        from samba_megatron.data.stream import SampleStream

        self.run, self.stop, self.config = run, stop, run.config
        self.schedule: Any = run.state.scheduler
        self.chunks, self.progress = run.state.model, run.state.progress
        self.metrics = MetricsFile(run.run_dir) if run.rank.rank == 0 else None
        self.evaluator = Evaluator(run.config, run.valid_dataset)
        self.rates = Rates(run.config, run.rank.world_size)
        self.started = time.monotonic()
        self.stream = SampleStream(
            run.train_dataset,
            run.config.training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            consumed_samples=self.progress.consumed_samples,
            read_ahead=run.config.data.num_workers,
            pin_memory=distributed.device_type() == "cuda",
        )

    def run_to_end(self) -> ExitCode:
        """Steps until done or stopped; saves and says why it ended."""
        self._announce()
        if self.config.validation.eval_at_start and self.progress.step == 0:
            self.validate()
        if self.config.training.gc_interval:
            gc.disable()
        self.run.console.start(self.progress.step, self.run.length.steps)
        reason = self._stop_reason()
        while reason is None:
            try:
                self._step()
            except NonFiniteStep as stop:
                return self._end_on_non_finite(stop)
            self._between_steps()
            reason = self._stop_reason()
        return self._end(*reason)

    def _step(self) -> None:
        watch = Stopwatch()
        start = time.perf_counter()
        size = self.run.batches.global_batch_size(self.progress.consumed_samples)
        with watch.measure("data"):
            micro_batches = self.stream.next_global_batch(size)
            stride = self.config.training.micro_batch_size * self.rates.data_parallel_size
            batches: list[Batch | None] = (
                list(micro_batches) if needs_data() else [None] * (size // stride)
            )
        result = train_step(
            self.chunks,
            self.run.state.optimizer,
            batches,
            self.config.data.sequence_length,
            self.config.training.micro_batch_size,
        )
        tokens = size * self.config.data.sequence_length
        lr = learning_rate(self.run.state.optimizer)
        self.schedule.step(tokens)
        self.progress.step += 1
        self.progress.consumed_samples += size
        self.progress.consumed_tokens += tokens
        seconds = {**watch.seconds, **result.seconds, "step": time.perf_counter() - start}
        self._record_step(result.loss, result.grad_norm, lr, size, tokens, seconds)

    def _record_step(
        self,
        loss: float,
        grad_norm: float,
        lr: float,
        size: int,
        tokens: int,
        seconds: dict[str, float],
    ) -> None:
        if self.metrics is None:
            return
        progress = self.progress
        record = self.metrics.write(
            "train",
            step=progress.step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            global_batch_size=size,
            samples=progress.consumed_samples,
            tokens=progress.consumed_tokens,
            **self.rates.of_step(tokens, seconds["step"]),
            memory_gib=round(hardware.peak_memory_gib(), 3),
            seconds={name: round(value, 6) for name, value in seconds.items()},
        )
        if progress.step % self.config.logging.log_interval == 0:
            left = self.run.length.tokens - progress.consumed_tokens
            eta = left / self.rates.smoothed_tokens_per_second
            self.run.console.step(record, self.run.length.steps, eta)

    def _between_steps(self) -> None:
        step = self.progress.step
        if self.config.training.gc_interval and step % self.config.training.gc_interval == 0:
            gc.collect()
        interval = self.config.validation.eval_interval
        if interval and step % interval == 0 and step < self.run.length.steps:
            self.validate()
        self._report_save(self.run.store.poll())
        every = self.config.checkpoint.save_interval
        if every and step % every == 0 and step < self.run.length.steps:
            self.save(blocking=not self.config.checkpoint.async_save)

    def validate(self) -> None:
        """Scores the held-out data and records the result."""
        if not self.evaluator.has_data:
            return
        start = time.perf_counter()
        with whole_parameters(self.chunks, self.config.parallel.overlap_param_gather):
            results = self.evaluator.evaluate(self.chunks)
        for result in results:
            text = f"validation at {result.sequence_length} tokens: loss {result.loss:.4f}, "
            self.run.console.say(
                f"step {self.progress.step} {text}perplexity {result.perplexity:.2f}"
            )
            if self.metrics:
                self.metrics.write(
                    "validation",
                    step=self.progress.step,
                    tokens=self.progress.consumed_tokens,
                    sequence_length=result.sequence_length,
                    loss=result.loss,
                    perplexity=result.perplexity,
                    scored_tokens=result.tokens,
                    seconds=round(time.perf_counter() - start, 3),
                )

    def save(self, blocking: bool) -> None:
        """Saves the state; in the background unless ``blocking``."""
        with whole_parameters(self.chunks, self.config.parallel.overlap_param_gather):
            self._report_save(self.run.store.save(self.run.state, blocking=blocking))

    def _report_save(self, report: Any) -> None:
        if report is None:
            return
        self.run.console.say(
            f"saved {report.path} ({report.bytes / 1e9:.2f} GB): the loop stood "
            f"{report.stall_seconds:.2f} s, writing took {report.write_seconds:.2f} s, "
            f"publishing {report.commit_seconds:.2f} s"
        )
        if self.metrics:
            self.metrics.write(
                "checkpoint",
                step=report.step,
                path=str(report.path),
                bytes=report.bytes,
                stall_seconds=report.stall_seconds,
                write_seconds=report.write_seconds,
                commit_seconds=report.commit_seconds,
            )

    def _stop_reason(self) -> tuple[ExitCode, str] | None:
        """Why to stop now, if at all; the same on every rank."""
        training, step = self.config.training, self.progress.step
        if step >= self.run.length.steps:
            return ExitCode.DONE, f"all {self.run.length.steps} steps are done"
        if training.exit_step is not None and step >= training.exit_step:
            return ExitCode.REQUEUE, f"training.exit_step {training.exit_step} is reached"
        minutes = (time.monotonic() - self.started) / 60
        limit = training.exit_duration_minutes
        out_of_time = limit is not None and minutes >= limit
        if not distributed.any_rank(self.stop.received is not None or out_of_time):
            return None
        if self.stop.received is not None:
            return ExitCode.REQUEUE, f"signal {self.stop.received} was received"
        if out_of_time:
            return ExitCode.REQUEUE, f"training.exit_duration_minutes {limit} is over"
        return ExitCode.REQUEUE, "another rank was asked to stop"

    def _end(self, code: ExitCode, reason: str) -> ExitCode:
        self.run.console.stop()
        done = code is ExitCode.DONE
        if done and self.config.validation.eval_at_end:
            self.validate()
        self._report_save(self.run.store.wait())
        if not done or self.config.checkpoint.save_at_end:
            self.save(blocking=True)
        self._close(code, reason)
        return code

    def _end_on_non_finite(self, stop: NonFiniteStep) -> ExitCode:
        """No weight has changed: the state before the bad step is worth keeping for a person.

        The folder's ``latest`` is at most that state, so nothing non-finite is ever resumed.
        """
        self.run.console.stop()
        step = self.progress.step + 1
        reason = f"step {step}: {stop.reason}; the state before it is saved, nothing after it"
        self._report_save(self.run.store.wait())
        if self.progress.step > 0:
            self.save(blocking=True)
        self._close(stop.code, reason)
        return stop.code

    def _close(self, code: ExitCode, reason: str) -> None:
        self.run.store.close()
        self.stream.close()
        self.run.console.say(f"ended with code {int(code)}: {reason}")
        if self.metrics:
            self.metrics.write("end", step=self.progress.step, exit_code=int(code), reason=reason)
            self.metrics.close()

    def _announce(self) -> None:
        run = self.run
        record = start_record(run)
        for title, rows in record.tables:
            run.console.facts(title, rows)
        if run.resumed:
            run.console.say(f"resuming after step {self.progress.step}")
        if self.metrics:
            self.metrics.write("start", step=self.progress.step, **record.values)


def learning_rate(optimizer: Any) -> float:
    """The rate of the groups that follow the schedule as it is."""
    return float(optimizer.param_groups[0]["lr"])
