"""What a trace of some steps says: time by kind of kernel and by kernel, where the device is idle,
and which operators make the copies and the elementwise arithmetic."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from samba_megatron.training.profile_trace import MODULE, Call, Kernel, Trace

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
_BY_OPERATOR = ("copies", "FP8 casts", "other")
"""Kinds whose kernels do not say what they are for."""
_LAUNCHED = "already launched"
_MARGIN = " " * 21
_NOISE = (
    r"\bvoid |\bat::native::|\bc10::|\(anonymous namespace\)::|\btransformer_engine::"
    r"|gpu_kernel_impl(_nocast)?<|<unnamed>::"
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel (or, on a CPU, an operator) by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS.items() if re.search(words, name)), "other")


class Gap(NamedTuple):
    """A time in which the device ran nothing, microseconds."""

    start: float
    stop: float
    after: Kernel
    before: Kernel

    @property
    def milliseconds(self) -> float:
        """How long it is."""
        return (self.stop - self.start) / 1000


@dataclass
class _Sum:
    """Of the times at one place: how many, how long, and by what."""

    calls: int = 0
    milliseconds: float = 0.0
    of: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def a_step(self, steps: int) -> dict[str, float]:
        """Both as they are a step."""
        return {"calls": self.calls / steps, "milliseconds": self.milliseconds / steps}

    def longest(self, count: int) -> list[tuple[str, float]]:
        """The largest of what it is made of."""
        return sorted(self.of.items(), key=lambda part: -part[1])[:count]


def kernel_times(trace: Trace, steps: int) -> dict[str, Any]:
    """Milliseconds a step by kind, of each kernel, between kernels, and by operator.

    Where no kernel ran on a GPU the operators' own times on the CPU are taken.

    Args:
        trace: what ran.
        steps: how many were profiled.
    """
    work = _work(trace)
    sums: dict[str, _Sum] = defaultdict(_Sum)
    for name, milliseconds, _ in work:
        sums[name].calls += 1
        sums[name].milliseconds += milliseconds
    kernels: list[dict[str, Any]] = [
        {"name": name, "kind": kind_of(name), **total.a_step(steps)}
        for name, total in sums.items()
        if total.milliseconds
    ]
    kinds: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        kinds[kernel["kind"]] += kernel["milliseconds"]
    gaps = idle_gaps(trace.kernels)
    kinds["idle"] = sum(gap.milliseconds for gap in gaps) / steps
    return {
        "steps": steps,
        "kinds": dict(sorted(kinds.items(), key=lambda kind: -kind[1])),
        "kernels": _by_time(kernels),
        "idle": idle_places(trace, gaps, steps),
        "operators": operators(work, steps),
    }


def _by_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: -row["milliseconds"])


def _work(trace: Trace) -> list[tuple[str, float, Call | None]]:
    """(name, milliseconds, the call that launched it) of each kernel, or of each operator."""
    if trace.kernels:
        return [(k.name, (k.stop - k.start) / 1000, k.launch) for k in trace.kernels]
    ran = (call for call in trace.operators if not call.name.startswith(MODULE))
    own = ((call, call.stop - call.start - call.inside) for call in ran)
    return [(call.name, max(time, 0.0) / 1000, call) for call, time in own]


def idle_gaps(kernels: list[Kernel]) -> list[Gap]:
    """Times in which the device ran nothing, between the first kernel and the last.

    Args:
        kernels: by their start.
    """
    gaps: list[Gap] = []
    last: Kernel | None = None
    for kernel in kernels:
        if last is not None and kernel.start > last.stop:
            gaps.append(Gap(last.stop, kernel.start, last, kernel))
        if last is None or kernel.stop > last.stop:
            last = kernel
    return gaps


def idle_places(trace: Trace, gaps: list[Gap], steps: int) -> list[dict[str, Any]]:
    """The gaps summed by the kernels around them and what launched the later one.

    `host` is what the launching thread did in them until the launch had returned (milliseconds a
    step, the five longest); what is left of a gap then, the host was ahead: `already launched`.
    """
    sums: dict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
    for gap in gaps:
        launch = gap.before.launch
        by = _place(launch)
        place = sums[gap.after.name, gap.before.name, by]
        place.calls += 1
        place.milliseconds += gap.milliseconds
        if launch is not None:
            launched = min(max(launch.stop, gap.start), gap.stop)
            did = trace.threads[launch.thread].doing(gap.start, launched)
            for name, us in [*did.items(), (_LAUNCHED, gap.stop - launched)]:
                place.of[name] += us / 1000 / steps
    return _by_time(
        [
            {"after": after, "before": before, "launched_by": by, **place.a_step(steps)}
            | {"host": dict(place.longest(5))}
            for (after, before, by), place in sums.items()
        ]
    )


def operators(work: list[tuple[str, float, Call | None]], steps: int) -> list[dict[str, Any]]:
    """Who launched the kernels that do not say what they are for, with shapes where recorded."""
    sums: dict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
    kinds = {name: kind_of(name) for name in {name for name, _, _ in work}}
    for name, milliseconds, launch in work:
        if kinds[name] in _BY_OPERATOR and milliseconds:
            total = sums[kinds[name], _place(launch), launch.inputs() if launch else ""]
            total.calls += 1
            total.milliseconds += milliseconds
            total.of[name] += milliseconds
    return _by_time(
        [
            {"kind": kind, "operator": place, "inputs": inputs, **total.a_step(steps)}
            | {"kernel": total.longest(1)[0][0]}
            for (kind, place, inputs), total in sums.items()
        ]
    )


def _place(launch: Call | None) -> str:
    return "unknown" if launch is None else launch.place() or "no operator"


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
        f"{_numbers(kernel)}  [{kernel['kind']}] {kernel['name'][:160]}"
        for kernel in times["kernels"][:80]
    ]
    if times["idle"]:
        lines += ["", "Idle: between which kernels, who launched the later, the host meanwhile"]
        lines += _largest(times["idle"], 15, _idle_lines)
    lines += ["", f"Who launches {', '.join(_BY_OPERATOR)}: operator and its inputs"]
    lines += _largest(times["operators"], 40, _operator_lines)
    return "\n".join(lines) + "\n"


def _largest(
    rows: list[dict[str, Any]], count: int, line: Callable[[dict[str, Any]], list[str]]
) -> list[str]:
    """The first rows in full, the others in one line."""
    lines = ["    ms/step   calls", *(text for row in rows[:count] for text in line(row))]
    rest = {key: sum(row[key] for row in rows[count:]) for key in ("milliseconds", "calls")}
    return lines + [f"{_numbers(rest)}  at {len(rows) - count} other places"] * (len(rows) > count)


def _numbers(row: dict[str, Any]) -> str:
    return f"{row['milliseconds']:11.3f} {row['calls']:7.1f}"


def _between(gap: dict[str, Any]) -> str:
    return f"{short(gap['after'])[:70]} -> {short(gap['before'])[:70]}"


def _idle_lines(row: dict[str, Any]) -> list[str]:
    host = "; ".join(
        f"{100 * milliseconds / row['milliseconds']:.0f} % {name}"
        for name, milliseconds in list(row["host"].items())[:2]
        if milliseconds
    )
    by = f"launched by {row['launched_by']}"
    return [f"{_numbers(row)}  {_between(row)}", _MARGIN + by] + [f"{_MARGIN}host: {host}"] * bool(
        host
    )


def _operator_lines(row: dict[str, Any]) -> list[str]:
    inputs = f" ({row['inputs']})" if row["inputs"] else ""
    of = short(row["kernel"])[:70]
    return [f"{_numbers(row)}  [{row['kind']}] {row['operator']}{inputs}", f"{_MARGIN}{of}"]


def short(kernel: str) -> str:
    """A kernel's name without what C++ adds to all of them."""
    return re.sub(_NOISE, "", kernel)
