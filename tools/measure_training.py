"""Measures whole training steps: recipes × precisions on real tokens, one table at the end.

    python tools/measure_training.py --recipes samba_421m samba_1.3b \
        --precisions bf16 fp8_delayed fp8_tensorwise --steps 120 \
        --data-path data/train --output measured

Each run goes through the same entry point as any other, in a process of its own. Figures are
medians over the second half of the steps; the loss is the mean of the last twenty. With
``-- --checkpoint.load CHECKPOINTS`` all start from one trained state and go on to step ``--steps``.

    python tools/measure_training.py --cases tools/measured_cases.yaml --steps 12 --quick \
        --time-limit 350 --output grid

measures a list of cases (what the planner is checked against) and keeps what it has when the time
is over. ``--quick`` draws large weights on the GPU, and starts the next case's imports while one
runs; without ``--data-path`` the tokens are random.
"""

import argparse
import dataclasses
import json
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.platform.files import write_text  # noqa: E402
from samba_megatron.tracking.metrics import read_metrics  # noqa: E402

PRECISIONS: dict[str, list[str]] = {
    "fp32": ["--precision.params_dtype", "fp32"],
    "bf16": ["--precision.params_dtype", "bf16"],
    **{
        f"fp8_{recipe}": [
            *("--precision.params_dtype", "bf16"),
            *("--precision.fp8", "hybrid", "--precision.fp8_recipe", recipe),
        ]
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
    },
}


_CASE_SECONDS = 20.0
"""No case is begun with less time than that."""
_AHEAD = 3
"""Cases whose imports a quick measurement has under way: they take longer than the steps."""
_LARGE = 1 << 22
"""Weights of more numbers are drawn on the GPU in a quick measurement."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One run to measure."""

    recipe: str
    precision: str = "bf16"
    micro_batch_size: int = 8
    global_batch_size: int | None = None
    """The micro-batch where unset: one micro-batch a step."""
    sequence_length: int | None = None
    """The recipe's where unset."""
    overrides: tuple[str, ...] = ()
    """Further options of the run."""

    @property
    def recipe_name(self) -> str:
        """``samba_1.3b`` for itself and for its file."""
        return Path(self.recipe).name.removesuffix(".yaml")

    @property
    def name(self) -> str:
        """Of its folder and its row."""
        name = f"{self.recipe_name}_{self.precision}"
        return "_".join([name, *(word.split(".")[-1].strip("-") for word in self.overrides)])


def main() -> None:
    """Runs every case and prints the table."""
    if sys.argv[1:2] == ["--warm"]:
        return train_warm()
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    args.data_path = args.data_path or write_random_tokens(args.output)
    cases = read_cases(args)
    stop = time.monotonic() + args.time_limit if args.time_limit else float("inf")
    rows: list[dict[str, Any]] = []
    runs = [Measured(args, case, number) for number, case in enumerate(cases)]
    try:
        for number, run in enumerate(runs):
            if time.monotonic() + _CASE_SECONDS > stop:
                print(f"the time is over: {len(runs) - number} cases are left out", flush=True)
                break
            rows.append(run.measure(stop, runs[number + 1 : number + 1 + _AHEAD]))
            write_text(args.output / "measured.json", json.dumps(rows, indent=1))
    finally:
        for run in runs:
            run.abandon()
    print(table([row for row in rows if "error" not in row]))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipes", nargs="+")
    what.add_argument("--cases", type=Path, help="YAML list of cases")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--data-path", help="dataset prefix; random tokens without it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--time-limit", type=float, help="seconds for all cases")
    parser.add_argument("--quick", action="store_true", help="shorten the starts (one process)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="further dotted overrides, after --")
    args = parser.parse_args()
    if args.quick and args.processes > 1:
        raise UserError(f"--quick measures one process, and --processes is {args.processes}")
    return args


def read_cases(args: argparse.Namespace) -> list[Case]:
    """What the command line asks for, in order."""
    if args.recipes:
        return [
            Case(recipe, precision, args.micro_batch_size, args.global_batch_size)
            for recipe in args.recipes
            for precision in args.precisions
        ]
    import yaml

    known = {field.name for field in dataclasses.fields(Case)}
    if not args.cases.is_file():
        raise UserError(f"--cases {args.cases} is not a file: give a YAML list of cases")
    cases = []
    for entry in yaml.safe_load(args.cases.read_text()):
        if unknown := set(entry) - known or {entry.get("precision", "bf16")} - set(PRECISIONS):
            raise UserError(
                f"{args.cases}: {', '.join(sorted(unknown))} is not known: a case has "
                f"{', '.join(sorted(known))}, a precision is one of {', '.join(PRECISIONS)}"
            )
        cases.append(Case(**{**entry, "overrides": tuple(map(str, entry.get("overrides", ())))}))
    return cases


def write_random_tokens(folder: Path) -> str:
    """A small dataset: what is in it does not matter for the time of a step."""
    import numpy as np

    from samba_megatron.data.indexed import IndexedWriter

    prefix = folder / "random"
    if not prefix.with_suffix(".idx").exists():
        tokens = np.random.default_rng(0).integers(0, 32000, (256, 8192), dtype=np.uint16)
        with IndexedWriter(prefix, np.uint16) as writer:
            for document in tokens:
                writer.add_document(document)
            writer.finish()
    return str(prefix)


class Measured:
    """A case's run: its process, which a quick measurement starts before its turn."""

    def __init__(self, args: argparse.Namespace, case: Case, number: int) -> None:
        self._args, self._case = args, case
        name = f"{number:02d}_{case.name}" if args.cases else case.name
        self._run_dir = args.output / name
        self._log = args.output / f"{name}.log"
        self._out: IO[str] | None = None
        self._process: subprocess.Popen[str] | None = None

    def prepare(self) -> None:
        """Starts the process, once, which waits for its turn."""
        if self._process is not None:
            return
        self._out = open(self._log, "w", encoding="utf-8")  # noqa: SIM115
        words, pipe = self._command(), None
        if self._args.quick:
            words, pipe = [sys.executable, str(Path(__file__).resolve()), "--warm"], subprocess.PIPE
        self._process = subprocess.Popen(
            words, stdin=pipe, stdout=self._out, stderr=self._out, text=True
        )

    def abandon(self) -> None:
        """Ends the process, if it was started and goes on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def measure(self, stop: float, following: "Sequence[Measured]") -> dict[str, Any]:
        """The case's row.

        Args:
            stop: moment (of the monotonic clock) at which it is ended.
            following: whose turn is next.

        Raises:
            UserError: if the run failed and is not one of a list, where its row says so.
        """
        print(f"{self._run_dir.name}: {self._args.steps} steps …", flush=True)
        start = time.monotonic()
        self.prepare()
        assert self._process is not None and self._out is not None
        if self._args.quick:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(self._arguments()) + "\n")
            self._process.stdin.close()
            for each in following:
                each.prepare()
        limit = None if stop == float("inf") else max(stop - time.monotonic(), 1.0)
        try:
            code = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.abandon()
            code = -1
        self._out.close()
        row = {**dataclasses.asdict(self._case), "recipe": self._case.recipe_name}
        if code:
            return row | {"error": self._failure(code)}
        row |= summarise(self._run_dir, self._args.steps)
        row["wall_seconds"] = round(time.monotonic() - start, 1)
        print(table([row]), flush=True)
        return row

    def _failure(self, code: int) -> str:
        problem = f"{self._run_dir.name} ended with code {code}: see {self._log}"
        if not self._args.cases:
            raise UserError(problem)
        print(problem, flush=True)
        lines = self._log.read_text(encoding="utf-8").splitlines()
        errors = [line for line in lines if "Error" in line or "error:" in line]
        return "the time was over" if code == -1 else (errors or lines or [problem])[-1][:300]

    def _command(self) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc-per-node", str(self._args.processes), *self._arguments()]

    def _arguments(self) -> list[str]:
        """The training command of the case: nothing is saved, nothing validated."""
        args, case = self._args, self._case
        fields: dict[str, Any] = {
            "run_dir": self._run_dir,
            "data.data_path": json.dumps([args.data_path]),
            "data.split": "100,0,0",
            "data.path_to_cache": args.output / "index_cache",
            "training.train_tokens": "null",
            "training.train_steps": args.steps,
            "training.micro_batch_size": case.micro_batch_size,
            "training.global_batch_size": case.global_batch_size or case.micro_batch_size,
            "schedule.lr_warmup_steps": max(args.steps // 10, 1),
            "validation.eval_interval": "null",
            "validation.eval_at_start": "false",
            "validation.eval_at_end": "false",
            "checkpoint.save_interval": "null",
            "checkpoint.save_at_end": "false",
            "logging.progress": "plain",
        }
        if case.sequence_length is not None:
            fields["data.sequence_length"] = case.sequence_length
            fields["validation.sequence_lengths"] = f"[{case.sequence_length}]"
        return [
            *(str(ROOT / "pretrain" / "pretrain_samba.py"), "--config", case.recipe),
            *(part for name, value in fields.items() for part in (f"--{name}", str(value))),
            *PRECISIONS[case.precision],
            *case.overrides,
            *args.overrides,
        ]


def train_warm() -> None:
    """Imports what a run needs, waits for its command line on standard input, and trains."""
    import torch

    from samba_megatron.model import fp8_weights, initialization
    from samba_megatron.platform import cpu_shim, noise

    with noise.quiet_imports():
        cpu_shim.install()
        noise.import_megatron()
        import samba_megatron.training.loop
        import samba_megatron.training.setup  # noqa: F401

    def fill(chunk: Any, model: Any, seed: int) -> None:
        """Large matrices where they are: drawing them on the CPU takes longer than the steps."""
        with torch.no_grad():
            for parameter in chunk.parameters():
                if parameter.numel() > _LARGE:
                    kind = {"dtype": parameter.dtype, "device": parameter.device}
                    drawn = torch.empty(tuple(parameter.shape), **kind).normal_(0.0, 0.02)
                    fp8_weights.set_initial(parameter, drawn)
        small = (each for each in named(chunk, model) if each[1].numel() <= _LARGE)
        initialization._named_initializers = lambda *_: small
        initialize(chunk, model, seed)
        initialization._named_initializers = named

    named, initialize = initialization._named_initializers, initialization.initialize_weights
    initialization.initialize_weights = fill
    if line := sys.stdin.readline():
        sys.argv = json.loads(line)
        runpy.run_path(sys.argv[0], run_name="__main__")


def summarise(run_dir: Path, steps: int) -> dict[str, Any]:
    """Medians over the second half of a run's steps."""
    start = read_metrics(run_dir / "metrics.jsonl", "start")[-1]
    records = read_metrics(run_dir / "metrics.jsonl", "train")
    steps -= start["step"]  # those before a checkpoint that it started from are not its own
    if len(records) != steps:
        raise UserError(f"{run_dir} has {len(records)} steps of {steps}: remove it and run again")
    second_half = records[len(records) // 2 :]

    def median(name: str) -> float | None:
        values = [record[name] for record in second_half if record[name] is not None]
        return statistics.median(values) if values else None

    return {
        "name": run_dir.name,
        "device": start["device"],
        "sequence_length": start["config"]["data"]["sequence_length"],
        "parameters": start["parameters"],
        "kernels": start["kernels"],
        "phases": start["phases"] | {"first step": round(records[0]["seconds"]["step"], 2)},
        "versions": start["versions"],
        "tokens_per_second": median("tokens_per_second"),
        "tflops_per_device": median("tflops_per_device"),
        "mfu": median("mfu"),
        "memory_gib": max(record["memory_gib"] for record in records),
        "memory_reserved_gib": max(record["memory_reserved_gib"] for record in records),
        "seconds": {
            part: statistics.median(record["seconds"][part] for record in second_half)
            for part in second_half[-1]["seconds"]
        },
        "first_loss": records[0]["loss"],
        "last_loss": statistics.fmean(record["loss"] for record in records[-20:]),
        "losses": [round(record["loss"], 5) for record in records],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| run | tok/s | TFLOP/s | MFU | memory GiB | loss, last 20 steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] is not None else "–"
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:,.0f} | {row['tflops_per_device']:.1f} "
            f"| {mfu} | {row['memory_gib']:.1f} | {row['last_loss']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
