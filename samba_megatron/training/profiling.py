"""A profile of some steps: a trace to look at, and where a step's time goes by kind of kernel.

`logging.profile_step_start` and `profile_step_end` as Megatron's flags of these names: from the
first (included) to the second (excluded). What is written lies in the run's folder `profile/`.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samba_megatron.config.logging import LoggingConfig
from samba_megatron.platform.files import write_text

KINDS = {
    "selective scan": r"scan_(forward|backward|segments|adjoint)|selective_scan|reduce_projections",
    "convolution": r"causal_conv1d|conv1d_silu",
    "attention": r"flash|fmha|attention|sdpa",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|addmm|aten::mm|aten::bmm|splitk",
    "communication": r"nccl|all_?reduce|all_?gather|reduce_?scatter|gloo|c10d",
    "optimizer": r"adam|multi_tensor|l2norm",
    "norms": r"rmsnorm|rms_norm|layer_?norm|_norm_kernel|normalization",
    "activations and rotary": r"swiglu|silu|sigmoid|rope|rotary",
    "FP8 casts": r"cast_transpose|quantize|fp8|amax|transpose_kernel",
    "loss": r"softmax|cross_entropy|nll|log_",
    "copies": r"copy|memcpy|memset|contiguous|catarray|::cat|fill|transpose",
}
"""Kind → pattern of kernel names; the first that fits counts."""
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(kernel: str) -> str:
    """The kind of a kernel (or, on a CPU, an operator) by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if re.search(words, name)), "other")


class StepProfiler:
    """Profiles this rank's steps of an interval; does nothing outside it or on other ranks."""

    def __init__(
        self, logging: LoggingConfig, run_dir: Path, rank: int, warn: Callable[[str], None]
    ) -> None:
        start, end = logging.profile_step_start, logging.profile_step_end
        wanted = start is not None and rank in logging.profile_ranks
        self._steps = range(start or 0, end or (start or 0) + 1) if wanted else range(0)
        self._folder = run_dir / "profile" / f"rank_{rank}"
        self._warn = warn
        self._profiler: Any = None
        self._count = 0

    def before(self, step: int) -> None:
        """Called before a step; its number."""
        if step in self._steps and self._profiler is None:
            self._guarded(self._start)

    def after(self, step: int) -> None:
        """Called after a step."""
        if self._profiler is None:
            return
        self._count += 1
        if step + 1 not in self._steps:
            self._guarded(self._finish)

    def close(self) -> None:
        """Writes what there is, where the run ends inside the interval."""
        if self._profiler is not None:
            self._guarded(self._finish)

    def _guarded(self, work: Callable[[], None]) -> None:
        """A profile that fails is said and forgotten: it must not end the run."""
        try:
            work()
        except (RuntimeError, OSError, ValueError) as error:
            self._steps, self._profiler = range(0), None
            self._warn(f"no profile: {error}")

    def _start(self) -> None:
        from torch.profiler import ProfilerActivity, profile, supported_activities

        wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA}
        profiler = profile(activities=list(wanted & set(supported_activities())))
        profiler.start()
        self._profiler, self._count = profiler, 0

    def _finish(self) -> None:
        profiler, self._profiler, self._steps = self._profiler, None, range(0)
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / "trace.json.gz"
        profiler.export_chrome_trace(str(trace))
        times = kernel_times(profiler, trace, self._count)
        write_text(self._folder / "kernels.json", json.dumps(times, indent=1))
        write_text(self._folder / "kernels.txt", describe(times))


def kernel_times(profiler: Any, trace: Path, steps: int) -> dict[str, Any]:
    """Milliseconds a step by kind, of each kernel, and between kernels.

    Where no kernel ran on a GPU the operators' own times on the CPU are taken.

    Args:
        profiler: torch's, stopped.
        trace: what it exported (gzipped JSON).
        steps: how many were profiled.
    """
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        ran = [e for e in json.load(file)["traceEvents"] if e.get("cat") in _ON_DEVICE]
    totals: dict[str, tuple[float, int]] = {}
    if ran:
        for event in ran:
            total, calls = totals.get(event["name"], (0.0, 0))
            totals[event["name"]] = total + event["dur"], calls + 1
    else:
        for average in profiler.key_averages():
            totals[average.key] = average.self_cpu_time_total, average.count
    kernels: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": kind_of(name),
            "milliseconds": total / 1000 / steps,
            "calls": calls / steps,
        }
        for name, (total, calls) in totals.items()
        if total
    ]
    kernels.sort(key=lambda kernel: -kernel["milliseconds"])
    kinds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        kinds[kernel["kind"]] += kernel["milliseconds"]
    gaps = idle_gaps(ran)
    kinds["idle"] = sum(gap["milliseconds"] for gap in gaps) / steps
    longest = sorted(gaps, key=lambda gap: -gap["milliseconds"])[:20]
    times = {
        "kinds": dict(sorted(kinds.items(), key=lambda kind: -kind[1])),
        "kernels": kernels,
        "longest_gaps": longest,
    }
    return {"steps": steps, **times}


def idle_gaps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Times in which the device ran nothing, each with the kernels before and after it."""
    gaps: list[dict[str, Any]] = []
    end, last = None, ""
    for event in sorted(events, key=lambda event: float(event["ts"])):
        start, stop = float(event["ts"]), float(event["ts"]) + float(event["dur"])
        if end is not None and start > end:
            milliseconds = (start - end) / 1000
            gaps.append({"milliseconds": milliseconds, "after": last, "before": event["name"]})
        if end is None or stop > end:
            end, last = stop, event["name"]
    return gaps


def describe(times: dict[str, Any]) -> str:
    """The tables for a person."""
    total = sum(times["kinds"].values()) or 1.0
    lines = [f"Milliseconds a step, of {times['steps']} steps", ""]
    lines += [
        f"{milliseconds:9.2f}  {100 * milliseconds / total:5.1f} %  {kind}"
        for kind, milliseconds in times["kinds"].items()
    ]
    lines += [f"{total:9.2f}  in all", "", "    ms/step   calls  kernel"]
    lines += [
        f"{kernel['milliseconds']:11.3f} {kernel['calls']:7.1f}  "
        f"[{kernel['kind']}] {kernel['name'][:160]}"
        for kernel in times["kernels"][:80]
    ]
    lines += ["", "Longest times without a kernel, ms"]
    lines += [
        f"{gap['milliseconds']:11.3f}  {gap['after'][:60]} -> {gap['before'][:60]}"
        for gap in times["longest_gaps"]
    ]
    return "\n".join(lines) + "\n"
