"""A trace of torch's profiler: what ran on the device, and what the host did when it launched it.

Times are microseconds, as in the file. A kernel knows its launch by the correlation id that both
have; a launch lies in time within the operator and the ranges that made it, on one thread.
"""

import gzip
import json
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import prod
from pathlib import Path
from typing import Any

MODULE = "module "
"""Begins the name of a range around a module's forward."""
_NODE = "autograd::engine::evaluate_function: "
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_TYPES = {"c10::BFloat16": "bf16", "c10::Half": "f16", "float": "f32", "double": "f64"}
_TYPES |= {"long int": "i64", "long": "i64", "int": "i32"}
_RUNTIME = ("cuda_runtime", "cuda_driver")
_ON_HOST = ("cpu_op", "user_annotation", *_RUNTIME)


@dataclass(slots=True, eq=False)
class Call:
    """Something the host did: an operator, a range, or a call of CUDA's runtime."""

    name: str
    category: str
    start: float
    stop: float
    thread: Any
    args: dict[str, Any] = field(default_factory=dict)
    parent: "Call | None" = None
    """The call it lies in."""
    forward: "Call | None" = None
    """Of a node of the backward pass: the call that made it."""
    inside: float = 0.0
    """Time of the calls directly within it."""

    def stack(self) -> list["Call"]:
        """The calls it lies in and itself, outermost first."""
        calls, call = [self], self.parent
        while call is not None:
            calls.append(call)
            call = call.parent
        return calls[::-1]

    def inputs(self) -> str:
        """What the innermost aten operator was given, as `bf16[4096, 1, 2304], f32[4096]`; nothing
        where shapes were not recorded."""
        aten = [call for call in self.stack() if call.name.startswith("aten::")]
        args = aten[-1].args if aten else {}
        columns = [args.get(name, []) for name in ("Input type", "Input Dims", "Input Strides")]
        return ", ".join(_tensor(*one) for one in zip(*columns, strict=False) if one[1])

    def place(self) -> str:
        """Modules (two at most), ranges, autograd's functions; the outermost and the innermost aten
        operator; and the call itself where it waits. A node of the backward pass has the modules
        of what made it."""
        stack = self.stack()
        modules = _modules(stack)
        if not modules:
            forward = next((call.forward for call in reversed(stack) if call.forward), None)
            modules = _modules(forward.stack()) if forward else []
        aten = [call for call in stack if call.name.startswith("aten::")]
        kept = [
            call.name.removeprefix(_NODE)
            for call in stack
            if (call in (aten[0], aten[-1]) if call in aten else _tells(call, self))
        ]
        names = [*modules[-2:], *kept]
        return " > ".join(name for name, _ in groupby(names))


def _modules(stack: list[Call]) -> list[str]:
    names = (call.name for call in stack)
    return [name.removeprefix(MODULE) for name in names if name.startswith(MODULE)]


def _tells(call: Call, innermost: Call) -> bool:
    """Whether a call that is no aten operator belongs in the name of a place."""
    if call.category in _RUNTIME:
        return call is innermost and "Launch" not in call.name
    return not call.name.startswith(MODULE)


def _tensor(kind: str, shape: list[Any], strides: list[Any]) -> str:
    """A tensor's type and shape, and its strides where it is not contiguous; or a list's shapes."""
    text = f"{_TYPES.get(kind, kind)}{shape}"
    if isinstance(shape[0], list):
        return text if len(text) < 100 else f"{kind} of {len(shape)}"
    wanted = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    pairs = zip(shape, strides, wanted, strict=False)
    as_usual = all(size == 1 or stride == usual for size, stride, usual in pairs)
    return text if as_usual else f"{text} by {strides}"


class Thread:
    """One thread's calls, each told what it lies in."""

    def __init__(self, calls: Iterable[Call]) -> None:
        self.calls = sorted(calls, key=lambda call: (call.start, -call.stop))
        self._starts = [call.start for call in self.calls]
        around: list[Call] = []
        for call in self.calls:
            while around and around[-1].stop <= call.start:
                around.pop()
            if around:
                call.parent = around[-1]
                call.parent.inside += call.stop - call.start
            around.append(call)

    def at(self, time: float) -> tuple[Call | None, Call | None]:
        """The innermost call that goes on at a time, and what ended last within it."""
        index = bisect_right(self._starts, time) - 1
        call, ended = self.calls[index] if index >= 0 else None, None
        while call is not None and call.stop <= time:
            call, ended = call.parent, call
        return call, ended

    def doing(self, start: float, stop: float) -> dict[str, float]:
        """What the thread did from one time to another: name → microseconds."""
        did: dict[str, float] = defaultdict(float)
        if stop <= start:
            return did
        going, _ = self.at(start)
        calls = self.calls[bisect_left(self._starts, start) : bisect_left(self._starts, stop)]
        calls += going.stack() if going else []
        times = {time for call in calls for time in (call.start, call.stop) if start < time < stop}
        for begin, end in pairwise(sorted({start, stop} | times)):
            did[_activity(*self.at((begin + end) / 2))] += end - begin
        return did


def _activity(call: Call | None, ended: Call | None) -> str:
    """A name for what a thread does within a call (or none), after another that has ended."""
    since = f" after {ended.name.removeprefix(_NODE)}" if ended else ""
    if call is None:
        return f"unnamed code{since}"
    if call.category == "user_annotation":
        return f"{call.place() or call.name}: unnamed code{since}"
    return call.place() or call.name


@dataclass(slots=True, eq=False)
class Kernel:
    """Something that ran on the device (a copy or a fill too)."""

    name: str
    start: float
    stop: float
    launch: Call | None = None


class Trace:
    """The kernels of a trace by their start, and its threads."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        calls = [_call(event) for event in events if event.get("cat") in _ON_HOST]
        by_thread: dict[Any, list[Call]] = defaultdict(list)
        for call in calls:
            by_thread[call.thread].append(call)
        self.threads = {thread: Thread(own) for thread, own in by_thread.items()}
        self.operators = [call for call in calls if call.category not in _RUNTIME]
        _join_backward(calls, events)
        launches = self._launches(calls)
        self.kernels = sorted(
            (_kernel(event, launches) for event in events if event.get("cat") in _ON_DEVICE),
            key=lambda kernel: kernel.start,
        )

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """From the gzipped JSON that torch exports."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return cls(json.load(file)["traceEvents"])

    def _launches(self, calls: list[Call]) -> dict[Any, Call]:
        """Correlation id → the call of CUDA's runtime. Where the runtime numbers a thread otherwise
        than torch, the operator is found by the id that torch gave it."""
        by_id = {call.args.get("External id"): call for call in self.operators}
        launches: dict[Any, Call] = {}
        for call in calls:
            if call.category in _RUNTIME and "correlation" in call.args:
                launches.setdefault(call.args["correlation"], call)
                known = by_id.get(call.args.get("External id"))
                if call.parent is None and known and known.start <= call.start <= known.stop:
                    call.parent, call.thread = known, known.thread
        return launches


def _call(event: dict[str, Any]) -> Call:
    start, thread = float(event["ts"]), (event.get("pid"), event.get("tid"))
    stop = start + float(event["dur"])
    return Call(event["name"], event["cat"], start, stop, thread, event.get("args", {}))


def _kernel(event: dict[str, Any], launches: dict[Any, Call]) -> Kernel:
    start = float(event["ts"])
    launch = launches.get(event.get("args", {}).get("correlation"))
    return Kernel(event["name"], start, start + float(event["dur"]), launch)


def _join_backward(calls: list[Call], events: list[dict[str, Any]]) -> None:
    """Tells the nodes of the backward pass what made them, by the arrows that torch draws."""
    arrows = [event for event in events if event.get("cat") == "fwdbwd"]
    if not arrows:
        return
    at = {(call.thread, call.start): call for call in calls}
    ends = {
        (event["id"], event["ph"]): at.get(((event["pid"], event["tid"]), float(event["ts"])))
        for event in arrows
    }
    for (number, phase), call in ends.items():
        if phase == "f" and call is not None:
            call.forward = ends.get((number, "s"))
