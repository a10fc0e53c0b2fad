"""Measures kernels, layers and whole training steps of a recipe, each beside its peers, in one run.

    python tools/benchmark.py --output benchmark
    python tools/benchmark.py --output benchmark --recipe samba_421m --parts step --time-limit 300

Kernels: every backend of every operation, forward and backward, with the share of the time that the
device needs at least. Layers: one Mamba, attention and MLP layer. Step: the whole optimizer step as
tools/measure_training.py measures it. Peers are what is installed of mamba-ssm, flash-attn,
Transformer Engine and flash-linear-attention; what is missing or fails is named, and the rest goes
on. On a GPU the defaults are samba_1.3b, 8 x 4096 in bf16 (kernels at 1x32768 too); on a CPU
samba_tiny, 1 x 256 in fp32. To the folder go benchmark.json, benchmark.md and benchmark.png.
"""

import argparse
import json
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.benchmarks.plan import PARTS, Plan  # noqa: E402
from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.platform.findings import Finding, State  # noqa: E402
from samba_megatron.platform.trials import START, run_in_children  # noqa: E402

CASES = "samba_megatron.benchmarks.cases"
CASE_SECONDS = 240.0
"""What a case may take, compiling included."""
PRECISIONS = ("fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "fp8_mxfp8")


def main() -> None:
    """Measures part after part, and writes what was found so far after each."""
    args = parse_arguments()
    Plan.for_machine(False, **given(args))  # mistakes are found before anything is measured
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    stop = started + args.time_limit if args.time_limit else float("inf")
    in_one_process = ["machine", *(part for part in args.parts if part != "step")]
    with closing(children(args, stop, in_one_process)) as found:
        machine = next(found)
        if time.monotonic() > stop:
            raise UserError(f"--time-limit {args.time_limit}: over before any case: give more")
        if machine.state is not State.OK:
            raise UserError(f"this machine cannot be measured: {machine.found}")
        say(f"machine: {machine.found}")
        benchmark = Benchmark(args, started, stop, machine.figures)
        benchmark.take(found)
    if "step" in args.parts:
        benchmark.measure_steps()
    print(benchmark.write())
    print(f"in {args.output}: benchmark.md, benchmark.json, benchmark.png")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the results")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    add("--recipe", help="whose sizes (samba_1.3b on a GPU, samba_tiny on a CPU)")
    add("--micro-batch-size", type=int, help="sequences (8 on a GPU, 1 on a CPU)")
    add("--sequence-length", type=int, help="tokens of a sequence (4096 on a GPU, 256 on a CPU)")
    add("--also", nargs="*", metavar="SHAPE", help="further shapes for kernels (1x32768 on a GPU)")
    steps = "of this project's steps (bf16 and fp8_tensorwise on a GPU, fp32 on a CPU)"
    add("--precisions", nargs="+", choices=PRECISIONS, help=steps)
    add("--steps", type=int, help="of a whole step's measurement (24)")
    add("--seconds", type=float, help="for which one figure of a kernel is measured (0.4)")
    add("--time-limit", type=float, help="seconds for everything; what is left is left out")
    args = parser.parse_args()
    for name, least in (("micro_batch_size", 1), ("sequence_length", 2), ("steps", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    for name in ("seconds", "time_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: give seconds, more than 0")
    return args


def given(args: argparse.Namespace) -> dict[str, object]:
    """The plan's fields that the command line sets; None: the machine's default."""
    return {
        "recipe": args.recipe,
        "batch": args.micro_batch_size,
        "length": args.sequence_length,
        "also": None if args.also is None else tuple(args.also),
        "steps": args.steps,
        "seconds": args.seconds,
    }


def children(args: argparse.Namespace, stop: float, parts: list[str]) -> Generator[Finding]:
    """The findings of all cases of the parts, measured in a process of their own."""
    arguments = [json.dumps(given(args)), *parts]
    return run_in_children(CASES, CASE_SECONDS, arguments, stop)


class Benchmark:
    """What has been found, on disk after each part.

    Args:
        args: the command line.
        started: moment (of the monotonic clock) at which it began.
        stop: at which the time is over.
        machine: its figures.
    """

    def __init__(
        self, args: argparse.Namespace, started: float, stop: float, machine: dict[str, Any]
    ) -> None:
        self._args, self._started, self._stop, self._machine = args, started, stop, machine
        self._plan = Plan.for_machine(machine["on_gpu"], **given(args))
        self._findings: list[Finding] = []
        self._notes: list[str] = []

    def take(self, findings: Iterator[Finding]) -> None:
        """Keeps and says findings as they come, until the time is over."""
        try:
            for finding in findings:
                over = time.monotonic() > self._stop
                if over and finding.state is State.BROKEN:
                    finding = replace(finding, state=State.OFF, found="the time was over")
                if not over or finding.name != START[1]:
                    self._findings.append(finding)
                    mark = "" if finding.state is State.OK else "not measured: "
                    say(f"{finding.area}: {finding.name}: {mark}{finding.found}")
                if over:
                    self._note("left out for --time-limit: cases that are not listed")
                    return
        finally:
            self.write()

    def measure_steps(self) -> None:
        """This project's steps, and fla's."""
        from samba_megatron.benchmarks import own_step

        if time.monotonic() > self._stop:
            return self._note("left out for --time-limit: step")
        default = ("bf16", "fp8_tensorwise") if self._machine["on_gpu"] else ("fp32",)
        precisions = self._args.precisions or default
        say(f"step: {self._plan.steps} steps each of {', '.join(precisions)} …")
        folder = self._args.output / "step"
        tool = Path(__file__).with_name("measure_training.py")
        self.take(own_step.measure(tool, self._plan, precisions, folder, self._stop, say))
        if time.monotonic() > self._stop:
            return self._note("left out for --time-limit: fla's steps")
        with closing(children(self._args, self._stop, ["step"])) as found:
            self.take(found)

    def _note(self, text: str) -> None:
        say(text)
        self._notes.append(text)

    def write(self) -> str:
        """Table, JSON and picture; returns the table."""
        from samba_megatron.benchmarks import report, results
        from samba_megatron.platform.files import write_text

        output = self._args.output
        self._machine["seconds"] = round(time.monotonic() - self._started, 1)
        found = results.collect(self._plan, self._machine, self._findings, self._notes)
        text = report.markdown(found)
        write_text(output / "benchmark.json", json.dumps(found, indent=1) + "\n")
        write_text(output / "benchmark.md", text)
        report.plot(found, output / "benchmark.png")
        return text


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
