"""The training loop: steps, validation, saving, and every way to end."""

import gc
import time
from typing import TYPE_CHECKING, Any

from samba_megatron.checkpoint.state import Progress
from samba_megatron.data.stream import Batch
from samba_megatron.platform import distributed, hardware
from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking import shipping
from samba_megatron.tracking.ledger import Cause
from samba_megatron.tracking.metrics import MetricsFile
from samba_megatron.training.data_parallel import release, whole_parameters
from samba_megatron.training.endings import RunLog
from samba_megatron.training.evaluation import Evaluator
from samba_megatron.training.fp8_health import Fp8Health, worst
from samba_megatron.training.graphed_schedule import GraphedSchedule
from samba_megatron.training.layer_norms import LayerNorms
from samba_megatron.training.profiling import StepProfiler
from samba_megatron.training.report import Rates, start_record
from samba_megatron.training.rollback import Recovery
from samba_megatron.training.schedule import needs_data, needs_tokens, own_piece, run_schedule
from samba_megatron.training.setup import Run
from samba_megatron.training.signals import Stop, StopRequest
from samba_megatron.training.spikes import SkippedStep, SpikeGuard, watch_grad_norm
from samba_megatron.training.step import NonFiniteStep, train_step
from samba_megatron.training.stragglers import RankTimes
from samba_megatron.training.timing import StepClock, Stopwatch, attach_timers
from samba_megatron.training.watchdog import Watchdog

if TYPE_CHECKING:
    from samba_megatron.data.stream import SampleStream


class Loop:
    """One process's part in a run that is set up."""

    def __init__(self, run: Run, stop: StopRequest, log: RunLog) -> None:
        self.run, self.stop, self.log, self.config = run, stop, log, run.config
        self.schedule: Any = run.state.scheduler
        self.chunks = run.state.model
        self.metrics = MetricsFile(run.run_dir, run.console.hear) if run.rank.rank == 0 else None
        self.shipper: shipping.Process | None = None
        self.watchdog = Watchdog(log, run.config, run.rank.rank)
        self.evaluator = Evaluator(run.config, run.valid_dataset)
        self.rates = Rates(run.config, run.rank.world_size)
        self.profiler = StepProfiler(
            run.config.logging, run.run_dir, run.rank.rank, run.console.warn
        )
        self.timers, self.rank_times = attach_timers(self.chunks), self._rank_times()
        self.layer_norms = LayerNorms(self.chunks, run.config.logging.log_layer_norms_interval)
        self.fp8_health = Fp8Health(
            self.chunks, run.config.precision, run.config.logging.log_fp8_health_interval
        )
        self.between, self.nodes, self.slow = Stopwatch(), list[str](), set[int]()
        self.clock = StepClock()
        self.graphed = GraphedSchedule() if run.config.kernels.uses_graph else None
        self.stream = self._open_stream()
        self.guard = self.recovery = None
        if run.config.faults.skip_spikes:
            self.guard = SpikeGuard(run.config.faults, self.progress.faults)
            self.recovery = Recovery(run, self.guard, log, self.metrics)
        check = self.guard.check_grad_norm if self.guard else None
        self.grad_norm = watch_grad_norm(run.state.optimizer, check)

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.run.state.progress

    def _rank_times(self) -> RankTimes:
        from megatron.core import parallel_state

        stage = parallel_state.get_pipeline_model_parallel_rank()
        return RankTimes(self.config.logging.straggler_interval, stage)

    def _open_stream(self) -> "SampleStream":
        from megatron.core import parallel_state

        from samba_megatron.data.stream import BoundariesOnly, SampleStream

        dataset = self.run.train_dataset
        return SampleStream(
            dataset if needs_tokens() else BoundariesOnly(dataset),
            self.config.training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            consumed_samples=self.progress.consumed_samples,
            read_ahead=self.config.data.num_workers,
            pin_memory=distributed.device_type() == "cuda",
            piece=own_piece(),
        )

    def run_to_end(self) -> ExitCode:
        """Steps until done or stopped; saves and says why it ended."""
        self._announce()
        if self.config.validation.eval_at_start and self.progress.step == 0:
            self.validate()
        if self.config.training.gc_interval:
            gc.disable()
        self.run.console.start(self.run.length.steps)
        minutes = self.config.training.exit_duration_minutes
        self.stop.begin(self.run.run_dir, self.run.rank.rank == 0, minutes)
        self.stop.agree()
        stop = self._stop()
        while stop is None:
            number = self.progress.step + 1
            if self.profiler.before(number):
                self.clock.interrupt()
            try:
                self._step()
            except NonFiniteStep as bad:
                return self._end_on_non_finite(bad)
            if self.profiler.after(number):
                self.clock.interrupt()
            self._between_steps()
            stop = self._stop()
        return self._end(stop)

    def _step(self) -> None:
        number = self.progress.step + 1
        self.watchdog.step(number)
        watch = Stopwatch()
        self.clock.begin()
        length = self.config.data.sequence_length
        size = self.run.batches.global_batch_size(self.progress.consumed_tokens // length)
        with watch.measure("data"):
            micro_batches = self.stream.next_global_batch(size)
            reads = needs_data(self.config.data)
            if not reads:
                self.run.train_dataset.follow(self.progress.consumed_samples)
            stride = self.config.training.micro_batch_size * self.rates.data_parallel_size
            batches: list[Batch | None] = (
                list(micro_batches) if reads else [None] * (size // stride)
            )
        optimizer, micro_batch = self.run.state.optimizer, self.config.training.micro_batch_size
        lr = learning_rate(optimizer)
        try:
            with self.layer_norms.watching(number), self.fp8_health.watching(number):
                result = train_step(
                    *(self.chunks, optimizer, batches, length, micro_batch, self.grad_norm),
                    guard=self.guard,
                    stop=self.stop,
                    timers=self.timers,
                    before_update=self._record_layers,
                    schedule=self.graphed or run_schedule,
                )
        except SkippedStep as skipped:
            self._advance(size)
            self.clock.interrupt()
            return self._skip(skipped)
        self._advance(size)
        if self.guard is not None:
            self.guard.taken(result.loss, result.grad_norm)
        stall = self.between.seconds.pop("checkpoint_stall", 0.0)
        seconds = {**watch.seconds, **result.seconds, "step": self.clock.end(stall)}
        seconds["checkpoint_stall"] = stall
        self._record_step(result.loss, result.grad_norm, lr, size, size * length, seconds)

    def _advance(self, size: int) -> None:
        """A step is behind us, taken or not: the schedule and the data go on."""
        tokens = size * self.config.data.sequence_length
        self.schedule.step(tokens)
        self.progress.step += 1
        self.log.step = self.progress.step
        self.progress.consumed_samples += size
        self.progress.consumed_tokens += tokens

    def _skip(self, skipped: SkippedStep) -> None:
        assert self.recovery is not None
        self.recovery.record(skipped)
        if not self.recovery.is_wanted:
            return
        self.stream.close()
        with self.watchdog.phase("save"):
            self._report_save(self.run.store.wait())
            if self.graphed is not None:
                self.graphed.forget()  # Before the load: its memory is free for that.
            self.recovery.roll_back()
        self.stream = self._open_stream()

    def _record_step(
        self,
        loss: float,
        grad_norm: float,
        lr: float,
        size: int,
        tokens: int,
        seconds: dict[str, float],
    ) -> None:
        compared = self._compare_ranks(seconds)
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
            memory_reserved_gib=round(hardware.reserved_memory_gib(), 3),
            seconds={name: round(value, 6) for name, value in seconds.items()},
            **compared,
        )
        if progress.step % self.config.logging.log_interval == 0:
            left = self.run.length.tokens - progress.consumed_tokens
            eta = left / self.rates.smoothed_tokens_per_second
            self.run.console.step(record, self.run.length.steps, eta)

    def _record_layers(self) -> None:
        step = self.progress.step + 1
        if self.layer_norms.wanted(step):
            record = self.layer_norms.collect()
            if self.metrics:
                self.metrics.write("layers", step=step, **record)
        if self.fp8_health.wanted(step):
            record = self.fp8_health.collect()
            self.run.console.say(f"step {step} {worst(record)}")
            if self.metrics:
                self.metrics.write("fp8", step=step, **record)

    def _compare_ranks(self, seconds: dict[str, float]) -> dict[str, Any]:
        """What the step's record says of all ranks' times; every rank calls it."""
        self.rank_times.add(seconds)
        step = self.progress.step
        compared = self.rank_times.compare(step, self.nodes)
        if compared is None:
            return {}
        new = [found for found in compared.stragglers if found.rank not in self.slow]
        self.slow = {found.rank for found in compared.stragglers}
        for found in new:
            self.run.console.warn(f"step {step}: {found}")
        if self.metrics and compared.stragglers:
            ranks = [found.record() for found in compared.stragglers]
            self.metrics.write("stragglers", step=step, ranks=ranks)
        return {"compute_seconds": compared.summary}

    def _between_steps(self) -> None:
        step = self.progress.step
        if self.config.training.gc_interval and step % self.config.training.gc_interval == 0:
            gc.collect()
        validates = self._is_due(self.config.validation.eval_interval)
        saves = self._is_due(self.config.checkpoint.save_interval)
        if validates:
            self.validate()
        with self.between.measure("checkpoint_stall"):
            self._report_save(self.run.store.poll())
            if saves:
                self.save(blocking=not self.config.checkpoint.async_save)
        if validates or saves:
            self.stop.agree()  # that may have taken longer than a step
            self.clock.interrupt()

    def _is_due(self, interval: int | None) -> bool:
        """Whether what is done every so many steps is to be done now, before the last step."""
        step = self.progress.step
        return step < self.run.length.steps and bool(interval and step % interval == 0)

    def validate(self) -> None:
        """Scores the held-out data and records the result."""
        if not self.evaluator.has_data:
            return
        start = time.perf_counter()
        gathered = whole_parameters(self.chunks, self.config.parallel.overlap_param_gather)
        with self.watchdog.phase("validation"), gathered:
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
        self._count_data()
        gathered = whole_parameters(self.chunks, self.config.parallel.overlap_param_gather)
        with self.watchdog.phase("save"), gathered:
            self.progress.faults = self.guard.state() if self.guard else {}
            self._report_save(self.run.store.save(self.run.state, blocking=blocking))

    def _count_data(self) -> None:
        """Brings the ledger of samples by source up to date, and records it."""
        consumed, samples = self.progress.consumed_samples, self.run.train_dataset
        self.progress.data_consumed = samples.ledger(consumed)
        if self.metrics:
            by_source = samples.consumed_by_source(consumed)
            self.metrics.write("data", step=self.progress.step, consumed_by_source=by_source)

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

    def _stop(self) -> Stop | None:
        """Whether to stop now, and why; the same on every rank."""
        step, last, wanted = self.progress.step, self.run.length.steps, self.config.training
        if step >= last:
            return Stop(ExitCode.DONE, Cause.DONE, f"all {last} steps are done")
        if wanted.exit_step is not None and step >= wanted.exit_step:
            reason = f"training.exit_step {wanted.exit_step} is reached"
            return Stop(ExitCode.REQUEUE, Cause.USER_STOP, reason)
        return self.stop.explain()

    def _end(self, stop: Stop) -> ExitCode:
        self.run.console.stop()
        done = stop.code is ExitCode.DONE
        if done and self.config.validation.eval_at_end:
            self.validate()
        with self.watchdog.phase("save"):
            self._report_save(self.run.store.wait())
        if not done or self.config.checkpoint.save_at_end:
            self.save(blocking=True)
        else:
            self._count_data()
        self.stop.obeyed()
        return self._close(stop)

    def _end_on_non_finite(self, bad: NonFiniteStep) -> ExitCode:
        """No weight has changed: the state before the bad step is worth keeping for a person.

        The folder's ``latest`` is at most that state, so nothing non-finite is ever resumed.
        """
        self.run.console.stop()
        step = self.progress.step + 1
        reason = f"step {step}: {bad.reason}; the state before it is saved, nothing after it"
        with self.watchdog.phase("save"):
            self._report_save(self.run.store.wait())
        if self.progress.step > 0:
            self.save(blocking=True)
        cause = Cause.NON_FINITE if bad.code is ExitCode.HOLD else Cause.BAD_NODE
        return self._close(Stop(bad.code, cause, reason, bad.node))

    def _close(self, stop: Stop) -> ExitCode:
        self.profiler.close()
        self.run.store.close()
        self.stream.close()
        self.watchdog.stop()
        self.grad_norm.release()
        release(self.chunks)
        self.run.console.say(f"ended with code {int(stop.code)}: {stop.reason}")
        if self.metrics:
            step, code = self.progress.step, int(stop.code)
            self.metrics.write("end", step=step, exit_code=code, reason=stop.reason)
            self.metrics.close()
            self.log.end(stop.code, stop.cause, stop.reason, stop.bad_node)
            shipping.let_finish(self.shipper)
        return stop.code

    def _announce(self) -> None:
        run = self.run
        record = start_record(run)
        for title, rows in record.tables:
            run.console.facts(title, rows)
        if run.resumed:
            run.console.say(f"resuming after step {self.progress.step}")
        self.log.step = self.progress.step
        self.nodes = nodes = distributed.gather_text(hardware.node_name())
        stamp = distributed.gather_text(time.strftime("%Y%m%d-%H%M%S"))[0]
        self.watchdog.start(nodes, stamp)
        if self.metrics:
            self.metrics.write("start", step=self.progress.step, **record.values)
            self.shipper = shipping.beside(self.config)
            self.log.start(nodes, steps=run.length.steps, resumed=run.resumed)
        if run.corrupt_checkpoints:
            self.log.note("fallback", corrupt=run.corrupt_checkpoints)


def learning_rate(optimizer: Any) -> float:
    """The rate of the groups that follow the schedule as it is."""
    return float(optimizer.param_groups[0]["lr"])
