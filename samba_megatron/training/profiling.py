"""A profile of some steps: a trace to look at, and where a step's time goes by kind of kernel.

`logging.profile_step_start` and `profile_step_end` as Megatron's flags of these names: from the
first (included) to the second (excluded). What is written lies in the run's folder `profile/`.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import local
from typing import Any

from samba_megatron.config.logging import LoggingConfig
from samba_megatron.platform.files import write_text
from samba_megatron.training.profile_tables import describe, kernel_times
from samba_megatron.training.profile_trace import MODULE, Trace


class StepProfiler:
    """Profiles this rank's steps of an interval; does nothing outside it or on other ranks."""

    def __init__(
        self, logging: LoggingConfig, run_dir: Path, rank: int, warn: Callable[[str], None]
    ) -> None:
        start, end = logging.profile_step_start, logging.profile_step_end
        wanted = start is not None and rank in logging.profile_ranks
        self._steps = range(start or 0, end or (start or 0) + 1) if wanted else range(0)
        self._folder = run_dir / "profile" / f"rank_{rank}"
        self._shapes = logging.profile_shapes
        self._while = ExitStack()
        self._warn = warn
        self._profiler: Any = None
        self._count = 0

    def before(self, step: int) -> bool:
        """Called before a step, with its number; whether that took time."""
        begins = step in self._steps and self._profiler is None
        if begins:
            self._guarded(self._start)
        return begins

    def after(self, step: int) -> bool:
        """Called after a step, with its number; whether that took time."""
        if self._profiler is None:
            return False
        self._count += 1
        ends = step + 1 not in self._steps
        if ends:
            self._guarded(self._finish)
        return ends

    def close(self) -> None:
        """Writes what there is, where the run ends inside the interval."""
        if self._profiler is not None:
            self._guarded(self._finish)

    def _guarded(self, work: Callable[[], None]) -> None:
        """A profile that fails is said and forgotten: it must not end the run."""
        try:
            work()
        except (RuntimeError, OSError, ValueError) as error:
            self._while.close()
            self._steps, self._profiler = range(0), None
            self._warn(f"no profile: {error}")

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile, supported_activities

        wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
        activities = list(wanted & set(supported_activities()))
        profiler = profile(activities=activities, record_shapes=self._shapes)
        if self._shapes:
            self._while.enter_context(module_ranges())
        profiler.start()
        self._profiler, self._count = profiler, 0

    def _finish(self) -> None:
        profiler, self._profiler, self._steps = self._profiler, None, range(0)
        self._while.close()
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        times = kernel_times(Trace.read(trace), self._count)
        write_text(self._folder / "kernels.json", json.dumps(times, indent=1))
        write_text(self._folder / "kernels.txt", describe(times))


@contextmanager
def module_ranges() -> Iterator[None]:
    """Puts a named range around the forward of every module meanwhile, on any thread (layers that
    are computed again run on the backward pass's)."""
    from torch.nn.modules.module import (
        register_module_forward_hook,
        register_module_forward_pre_hook,
    )
    from torch.profiler import record_function

    going = local()

    def enter(module: Any, *_: Any) -> None:
        entered = record_function(MODULE + type(module).__name__)
        entered.__enter__()
        going.__dict__.setdefault("ranges", []).append(entered)

    def leave(*_: Any) -> None:
        if going.__dict__.get("ranges"):
            going.ranges.pop().__exit__(None, None, None)

    handles = [
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
