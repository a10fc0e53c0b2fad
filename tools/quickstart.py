"""The whole path on this machine: corpus, tokenizer, dataset, pre-training, resuming, loss curve,
the model in Hugging Face format and a text that it continues.

Every phase is a command of its own, printed as it is run, so that it can be repeated and varied by
hand; what an earlier quickstart has made is used again.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from samba_megatron.platform.errors import UserError, run_command
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.files import atomic_write
from samba_megatron.tracking.metrics import FILE_NAME, read_metrics
from samba_megatron.tracking.plot import plot_losses

ROOT = Path(__file__).resolve().parents[1]
SEQUENCE_LENGTH = 256
GLOBAL_BATCH_SIZE = 8
LEARNING_RATE = 3e-3  # for a run this short
EVAL_TOKENS = 32_768
PROMPT = "def __init__(self, "

console = Console(highlight=False)


@dataclass(frozen=True)
class Settings:
    """What the user chose."""

    output: Path
    steps: int
    resume_steps: int
    devices: int
    vocab_size: int
    max_megabytes: float | None
    overrides: list[str]


@dataclass(frozen=True)
class Phase:
    """One command and what it makes."""

    name: str
    command: list[str]
    outputs: list[Path]
    run: Path | None = None
    """A run's folder: not to be gone on with by another command or after other inputs."""


class Ledger:
    """Which command made what is in the output folder, kept there in ``phases.json``."""

    def __init__(self, output: Path) -> None:
        self._path = output / "phases.json"
        self._entries: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            self._entries = json.loads(self._path.read_text())

    def begun(self, phase: Phase) -> bool:
        """Whether this very command has been started before."""
        return self._entries.get(phase.name, {}).get("command") == phase.command

    def done(self, phase: Phase) -> bool:
        """Whether this very command has ended well and what it made is still there."""
        ended = self.begun(phase) and self._entries[phase.name]["seconds"] is not None
        return ended and all(path.exists() for path in phase.outputs)

    def record(self, phase: Phase, seconds: float | None) -> None:
        """Notes a start (``seconds`` is None) or an end, and forgets the phases after it."""
        names = list(self._entries)
        if phase.name in names:
            for name in names[names.index(phase.name) :]:
                del self._entries[name]
        self._entries[phase.name] = {"command": phase.command, "seconds": seconds}
        with atomic_write(self._path) as stream:
            json.dump(self._entries, stream, indent=1)


def main() -> int:
    """Runs the command; a phase that fails ends it with its exit code."""
    settings = _parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    logs = settings.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(settings.output)
    phases = _phases(settings)
    times: dict[str, str] = {}
    for number, phase in enumerate(phases, start=1):
        title = f"[bold]{number}/{len(phases)} {phase.name}[/]"
        if ledger.done(phase):
            console.print(f"{title}: there already, used again")
            times[phase.name] = "used again"
            continue
        console.print(title)
        started, log_file = time.monotonic(), logs / f"{phase.name}.log"
        if code := _run(phase, settings, ledger, log_file):
            print(f"error: {phase.name} failed: {_cause(log_file)} ({log_file})", file=sys.stderr)
            return code
        times[phase.name] = f"{time.monotonic() - started:.0f} s"
    _report(settings, times)
    return ExitCode.DONE


def _parse_arguments() -> Settings:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder for everything (quickstart)"
    )
    parser.add_argument("--steps", type=int, default=200, help="steps before the stop (200)")
    parser.add_argument("--resume-steps", type=int, default=20, help="steps after it (20)")
    parser.add_argument(
        "--devices", type=int, help="processes (every GPU; without a GPU one a core, at most 2)"
    )
    parser.add_argument("--vocab-size", type=int, default=16384, help="tokens (16384)")
    parser.add_argument("--max-megabytes", type=float, help="text to use (all)")
    parser.add_argument(
        "overrides", nargs="*", help="after --: further options for pretrain_samba.py"
    )
    arguments = vars(parser.parse_args())
    arguments["output"] = arguments["output"].absolute()
    arguments["devices"] = arguments["devices"] or _local_devices()
    if min(arguments["steps"], arguments["resume_steps"], arguments["devices"]) < 1:
        raise UserError("--steps, --resume-steps and --devices must be at least 1")
    return Settings(**arguments)


def _local_devices() -> int:
    """The GPUs of this machine, or two CPU processes where there are two cores."""
    if shutil.which("nvidia-smi"):
        import torch

        if torch.cuda.device_count():
            return torch.cuda.device_count()
    return min(2, len(os.sched_getaffinity(0)))


def _interrupt(*_: object) -> None:
    """SIGTERM stops the phase in progress as Ctrl-C does."""
    raise KeyboardInterrupt


def _phases(settings: Settings) -> list[Phase]:
    """The commands in order; each reads what those before it have made."""
    output = settings.output
    corpus, tokenizer, dataset = output / "corpus", output / "tokenizer", output / "dataset"
    limit = [] if settings.max_megabytes is None else [f"--max-megabytes={settings.max_megabytes}"]
    train, held_out = corpus / "train.jsonl", corpus / "validation.jsonl"
    phases = [
        Phase(
            "corpus",
            _tool("gather_corpus.py", "--output", corpus, *limit),
            [train, held_out],
        ),
        Phase(
            "tokenizer",
            _tool(
                *("train_tokenizer.py", "--input", train),
                *("--vocab-size", settings.vocab_size, "--output", tokenizer),
            ),
            [tokenizer / "tokenizer.json"],
        ),
    ]
    for text in (train, held_out):
        prefix = dataset / text.stem
        command = _tool(
            *("preprocess_corpus.py", "--input", text, "--tokenizer", tokenizer),
            *("--output-prefix", prefix, "--overwrite"),
        )
        made = [prefix.with_suffix(ending) for ending in (".bin", ".idx")]
        phases.append(Phase(f"dataset-{text.stem}", command, made))
    run = output / "run"
    first = Phase("train", _training(settings, settings.steps), [run / FILE_NAME], run)
    last = settings.steps + settings.resume_steps
    resumed = Phase("resume", _training(settings, last), first.outputs)
    return [*phases, first, resumed, *_export(output)]


def _export(output: Path) -> list[Phase]:
    """To Hugging Face format, and a continuation by the code that lies there."""
    exported = output / "huggingface"
    convert = _tool(
        *("convert_checkpoint.py", "to-hf", "--overwrite", "--output", exported),
        *("--checkpoint", output / "run" / "checkpoints"),
    )
    write = _tool(
        *("generate.py", "--model", exported, "--prompt", PROMPT),
        *("--max-new-tokens", 60, "--temperature", 0.5),
    )
    return [
        Phase("export", convert, [exported / "config.json"]),
        Phase("generate", write, []),
    ]


def _tool(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]


def _training(settings: Settings, train_steps: int) -> list[str]:
    """The run up to ``train_steps``: the same command, from nothing or from its checkpoint."""
    output, devices = settings.output, settings.devices
    micro_batch_size = -(-GLOBAL_BATCH_SIZE // devices)
    batch_size = micro_batch_size * devices
    options = {
        "run_dir": output / "run",
        "model.vocab_size": settings.vocab_size,
        "data.data_path": json.dumps([str(output / "dataset" / "train")]),
        "data.valid_data_path": json.dumps([str(output / "dataset" / "validation")]),
        "data.tokenizer": output / "tokenizer",
        "data.sequence_length": SEQUENCE_LENGTH,
        "training.micro_batch_size": micro_batch_size,
        "training.global_batch_size": batch_size,
        "training.train_tokens": "null",  # the recipe's measure of length; here it is steps
        "training.train_steps": train_steps,
        # The schedule ends where the run first stops: the steps after it are at the lowest rate.
        "schedule.lr_decay_tokens": settings.steps * batch_size * SEQUENCE_LENGTH,
        "optimizer.lr": LEARNING_RATE,
        "logging.log_interval": 10,
        "validation.eval_at_start": "true",
        "validation.eval_interval": max(1, settings.steps // 2),
        "validation.sequence_lengths": json.dumps([SEQUENCE_LENGTH, 4 * SEQUENCE_LENGTH]),
        "validation.eval_tokens": EVAL_TOKENS,
        "checkpoint.save": output / "run" / "checkpoints",
        "checkpoint.save_interval": max(1, settings.steps // 2),
    }
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    launcher += [f"--nproc-per-node={devices}", str(ROOT / "pretrain" / "pretrain_samba.py")]
    recipe = f"--config={ROOT / 'pretrain' / 'recipes' / 'samba_tiny.yaml'}"
    return [*launcher, recipe, *(f"--{k}={v}" for k, v in options.items()), *settings.overrides]


def _run(phase: Phase, settings: Settings, ledger: Ledger, log_file: Path) -> int:
    """Runs a phase's command, showing and keeping what it says; returns its exit code."""
    if phase.run and not ledger.begun(phase):
        _put_aside(phase.run)
    ledger.record(phase, None)
    shown = shlex.join(phase.command).replace(f"{Path.cwd()}{os.sep}", "")
    console.print(f"  $ {shown}", style="dim", markup=False, soft_wrap=True)
    started = time.monotonic()
    code = _stream(phase.command, _environment(settings), log_file)
    if code == 0:
        ledger.record(phase, time.monotonic() - started)
    return code if code >= 0 else 128 - code  # ended by a signal: as a shell says it


def _put_aside(run: Path) -> None:
    """Makes room for a new run; the last one that got as far as a checkpoint is kept."""
    if (run / "checkpoints").exists():
        previous = run.with_name(f"{run.name}-previous")
        shutil.rmtree(previous, ignore_errors=True)
        run.rename(previous)
        what = "options or data differ from the run before, which is kept as"
        console.print(f"  {what} {previous}", soft_wrap=True)
    shutil.rmtree(run, ignore_errors=True)


def _environment(settings: Settings) -> dict[str, str]:
    """Ours, with the cores shared out among the processes and tables as wide as the screen."""
    threads = max(1, len(os.sched_getaffinity(0)) // settings.devices)
    # megatron-core warns of each optional package that is not installed, on every import.
    ours = {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1", "COLUMNS": str(console.width - 2)}
    return {"OMP_NUM_THREADS": str(threads), **os.environ, **ours}


def _stream(command: list[str], environment: dict[str, str], log_file: Path) -> int:
    """Runs ``command``, passing its output on line by line; returns its exit code."""
    with (
        log_file.open("w") as log_stream,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in filter(str.strip, process.stdout):
                log_stream.write(line)
                console.print(f"  {line.rstrip()}", markup=False, soft_wrap=True)
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _cause(log_file: Path) -> str:
    """The sentence of the command that failed; torchrun says a lot after it."""
    errors = [line for line in log_file.read_text().splitlines() if line.startswith("error: ")]
    return errors[0].removeprefix("error: ") if errors else "its log says why"


def _report(settings: Settings, times: dict[str, str]) -> None:
    """Draws the losses and prints what came out, how long it took and where everything is."""
    records = read_metrics(settings.output / "run" / FILE_NAME)
    plot_losses(
        records,
        settings.output / "loss.png",
        f"samba_tiny on {settings.devices} processes",
        (settings.steps, "stopped and resumed"),
        (log(settings.vocab_size), "chance, ln V"),
    )
    for title, rows in (
        ("Results", _results(settings, records)),
        ("Times", times),
        ("Where it is", _places(settings.output)),
    ):
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)


def _results(settings: Settings, records: list[dict[str, Any]]) -> dict[str, str]:
    """Held-out loss and perplexity before, after and after resuming, and the speed."""
    rows = {"chance (ln V)": f"{log(settings.vocab_size):.3f} nats"}
    moments = {0: "before training", settings.steps: "after training"}
    moments[settings.steps + settings.resume_steps] = "after resuming"
    for record in records:
        if record["kind"] == "validation" and record["step"] in moments:
            name = f"held out, {moments[record['step']]}, {record['sequence_length']} tokens"
            rows[name] = f"{record['loss']:.3f} nats, perplexity {record['perplexity']:,.1f}"
    speeds = [r["tokens_per_second"] for r in records if r["kind"] == "train"]
    rows["speed"] = f"{median(speeds):,.0f} tokens/s on {settings.devices} processes"
    return rows


def _places(output: Path) -> dict[str, str]:
    return {
        "corpus": f"{output}/corpus/train.jsonl, validation.jsonl",
        "tokenizer": f"{output}/tokenizer",
        "indexed dataset": f"{output}/dataset/train.bin, train.idx, validation.bin, validation.idx",
        "checkpoints": f"{output}/run/checkpoints",
        "metrics": f"{output}/run/metrics.jsonl",
        "loss curve": f"{output}/loss.png",
        "Hugging Face model": f"{output}/huggingface",
        "what each phase said": f"{output}/logs",
    }


if __name__ == "__main__":
    run_command(main)
