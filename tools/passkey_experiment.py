"""Recall beyond the training length: a small Samba and two Transformers of its size, side by side.

    passkey_experiment.py prepare --output experiment/data
    passkey_experiment.py run --data experiment/data --output experiment/results

Three models (recipes passkey_samba, passkey_swa, passkey_full) are trained from scratch, at once,
on passkeys in filler text and on real text, documents apart and the loss on every token, at 2048
tokens, then asked for passkeys at 2048 … 65536 tokens and for the perplexity of held-out
text. --time-limit ends all in time and keeps what there is. What stands after -- goes to the
training commands. Where there are several GPUs each model has its own.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_megatron.platform.errors import UserError, run_command
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("passkey_samba", "passkey_swa", "passkey_full")
DATASETS = ("passkey", "text", "held_out")
SUITES = ("passkey", "perplexity")
_TRAINING_SHARE = 0.7
"""Of the time limit, start included: then the trainings are asked to save and to end."""
_SAVING_SECONDS, _STARTING_SECONDS, _REPORTING_SECONDS = 20.0, 20.0, 10.0


@dataclass(frozen=True)
class Running:
    """A command that has been started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def main() -> None:
    """Runs the command."""
    arguments = _parse()
    arguments.run(arguments)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="corpus, tokenizer and datasets")
    prepare.add_argument("--output", type=Path, required=True, help="folder to make")
    prepare.add_argument("--documents", type=int, default=48000, help="with passkeys (48000)")
    prepare.add_argument("--length", type=int, default=2048, help="of the longest (2048)")
    prepare.add_argument("--shortest", type=int, default=128, help="of the shortest (128)")
    prepare.add_argument("--vocab-size", type=int, default=4096, help="tokens (4096)")
    prepare.add_argument("--max-megabytes", type=float, default=11, help="of real text (11)")
    prepare.set_defaults(run=_prepare)
    run = commands.add_parser("run", help="train and evaluate")
    run.add_argument("--data", type=Path, required=True, help="what prepare has made")
    run.add_argument("--output", type=Path, required=True, help="folder for everything")
    run.add_argument("--lengths", default="2048,4096,8192,16384,32768,65536", help="to evaluate")
    run.add_argument("--depths", type=int, default=11, help="places of the key (11)")
    run.add_argument("--keys", type=int, default=5, help="keys a length and place (5)")
    run.add_argument("--passkey-share", type=float, default=0.8, help="of the training data (0.8)")
    run.add_argument("--piece", type=int, default=65536, help="tokens read at a time (65536)")
    run.add_argument("--time-limit", type=float, metavar="SECONDS", help="for everything")
    run.add_argument("--models", default=",".join(MODELS), help=f"recipes ({','.join(MODELS)})")
    run.add_argument("overrides", nargs="*", help="after --: options for pretrain_samba.py")
    run.set_defaults(run=_run)
    return parser.parse_args()


def _prepare(arguments: argparse.Namespace) -> None:
    """Each step a command, printed as it is run."""
    output = arguments.output
    if any((output / f"{name}.idx").exists() for name in DATASETS):
        raise UserError(f"--output {output} has datasets already: choose another folder")
    corpus, tokenizer = output / "corpus", output / "tokenizer"
    passkeys, train = output / "passkey.jsonl", corpus / "train.jsonl"
    _call("gather_corpus.py", "--output", corpus, "--max-megabytes", arguments.max_megabytes)
    _call(
        *("train_tokenizer.py", "--input", train, "--output", tokenizer),
        *("--vocab-size", arguments.vocab_size, "--split-digits"),
    )
    _call(
        *("make_retrieval_data.py", "passkey", "--tokenizer", tokenizer, "--output", passkeys),
        *("--length", arguments.length, "--shortest", arguments.shortest),
        *("--count", arguments.documents),
    )
    keys = ("--prompt-key", "prompt", "--completion-key", "completion")
    texts = (passkeys, train, corpus / "validation.jsonl")
    for name, text in zip(DATASETS, texts, strict=True):
        _call(
            *("preprocess_corpus.py", "--input", text, "--tokenizer", tokenizer),
            *("--output-prefix", output / name, *(keys if text == passkeys else ())),
        )


def _call(tool: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    print("$", *command, flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"{tool} failed: what it said above is the reason")


def _run(arguments: argparse.Namespace) -> None:
    started, limit = time.monotonic(), arguments.time_limit
    for name in DATASETS:
        if not (arguments.data / f"{name}.idx").is_file():
            raise UserError(
                f"--data {arguments.data} has no {name}.idx: make it with passkey_experiment.py "
                "prepare"
            )
    deadline = None if limit is None else started + limit
    models = arguments.models.split(",")
    arguments.output.mkdir(parents=True, exist_ok=True)
    gpus = _share_gpus(models)
    trainings = [_start(n, _training(arguments, n), arguments.output / n, gpus[n]) for n in models]
    if limit is not None:
        _ask_to_end(trainings, started + _TRAINING_SHARE * limit)
    _wait(trainings, None if limit is None else time.monotonic() + _SAVING_SECONDS)
    _say(started, "trained")
    seconds = None if deadline is None else deadline - time.monotonic() - _REPORTING_SECONDS
    evaluations = [
        _start(
            suite, _evaluation(arguments, name, suite, seconds), arguments.output / name, gpus[name]
        )
        for name in models
        for suite in SUITES
        if (arguments.output / name / "checkpoints").is_dir()
    ]
    _wait(evaluations, deadline)
    _say(started, "evaluated")
    results = {name: _results(arguments.output / name) for name in models}
    write_text(arguments.output / "experiment.json", json.dumps(results, indent=2) + "\n")
    _report(results)
    _plot(results, arguments.output / "experiment.png")


def _say(started: float, what: str) -> None:
    print(f"{what} after {time.monotonic() - started:.0f} s", flush=True)


def _training(arguments: argparse.Namespace, name: str) -> list[str]:
    data, run, share = arguments.data, arguments.output / name, arguments.passkey_share
    options: dict[str, Any] = {
        "run_dir": run,
        "data.data_path": json.dumps(
            [share, str(data / "passkey"), round(1 - share, 6), str(data / "text")]
        ),
        "data.valid_data_path": json.dumps([str(data / "held_out")]),
        "data.tokenizer": data / "tokenizer",
        "data.path_to_cache": run / "index_cache",
        "checkpoint.save": run / "checkpoints",
        "checkpoint.async_save": "false",
        "training.micro_batch_size": 16,
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    script = ROOT / "pretrain" / "pretrain_samba.py"
    return [sys.executable, str(script), f"--config={name}", *words, *arguments.overrides]


def _evaluation(
    arguments: argparse.Namespace, name: str, suite: str, seconds: float | None
) -> list[str]:
    run = arguments.output / name
    options: dict[str, Any] = {
        "--checkpoint": run / "checkpoints",
        "--suite": suite,
        "--output": run / suite,
        "--lengths": arguments.lengths,
        "--piece": arguments.piece,
        "--tokenizer": arguments.data / "tokenizer",
    }
    if suite == "perplexity":
        options["--data"] = arguments.data / "held_out"
    else:
        options |= {"--depths": arguments.depths, "--keys": arguments.keys}
    if seconds is not None:
        options["--time-limit"] = max(1.0, seconds - _STARTING_SECONDS)
    words = [str(word) for option in options.items() for word in option]
    return [sys.executable, str(ROOT / "tools" / "evaluate.py"), *words]


def _share_gpus(models: list[str]) -> dict[str, dict[str, str]]:
    """Model → what its processes have in their environment: a GPU of its own, as far as they go."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = itertools.cycle(visible.split(","))
    return {name: {"CUDA_VISIBLE_DEVICES": gpu} for name, gpu in zip(models, gpus, strict=False)}


def _start(name: str, command: list[str], folder: Path, more: dict[str, str]) -> Running:
    print("$", *command, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **more}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
    return Running(name, process, log)


def _wait(running: list[Running], deadline: float | None) -> None:
    """Until all have ended; those that have not by the deadline are stopped."""
    try:
        for one in running:
            left = None if deadline is None else max(0.1, deadline - time.monotonic())
            try:
                code = one.process.wait(left)
            except subprocess.TimeoutExpired:
                print(f"{one.name} is stopped at the time limit: {one.log}", flush=True)
                continue
            if code not in (ExitCode.DONE, ExitCode.REQUEUE):
                print(f"{one.name} failed with code {code}: {one.log}", flush=True)
    finally:
        for one in running:
            one.process.kill()


def _ask_to_end(running: list[Running], moment: float) -> None:
    """Waits until then, unless all have ended before; then those that have not are to save."""
    while time.monotonic() < moment and any(one.process.poll() is None for one in running):
        time.sleep(0.2)
    for one in running:
        one.process.send_signal(signal.SIGTERM)


def _results(folder: Path) -> dict[str, Any]:
    """What of a model there is."""
    from samba_megatron.tracking.metrics import FILE_NAME, read_metrics

    found: dict[str, Any] = {}
    if (folder / FILE_NAME).is_file() and (steps := read_metrics(folder / FILE_NAME, "train")):
        found["steps"], found["loss"] = steps[-1]["step"], steps[-1]["loss"]
        found["tokens_per_second"] = sorted(s["tokens_per_second"] for s in steps)[len(steps) // 2]
    for suite in SUITES:
        if (folder / suite / "results.json").is_file():
            found[suite] = json.loads((folder / suite / "results.json").read_text("utf-8"))
    return found


def _report(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "length", *(f"{n.removeprefix('passkey_')} {w}" for n in results for w in _COLUMNS)
    )
    for length in _lengths(results):
        table.add_row(
            f"{length:,}", *(_cell(results[n], s, str(length)) for n in results for s in SUITES)
        )
    Console(width=110).print(table)
    for name, found in results.items():
        if "steps" in found:
            print(f"{name}: {found['steps']:,} steps, last loss {found['loss']}")


_COLUMNS = ("keys, digits", "perplexity")
_FIGURES = {"passkey": "accuracy", "perplexity": "perplexity"}


def _figures(found: dict[str, Any], suite: str) -> dict[str, float]:
    """Length → figure, as far as there is one."""
    figures = found.get(suite, {}).get(_FIGURES[suite], {})
    return {length: value for length, value in figures.items() if value is not None}


def _lengths(results: dict[str, Any]) -> list[int]:
    return sorted(
        {int(n) for found in results.values() for s in SUITES for n in _figures(found, s)}
    )


def _cell(found: dict[str, Any], suite: str, length: str) -> str:
    value = _figures(found, suite).get(length)
    if value is None:
        return "–"
    if suite == "perplexity":
        return f"{value:,.2f}"
    digits = found[suite].get("digits", {}).get(length)
    return f"{value:.0%}" + ("" if digits is None else f", {digits:.0%}")


def _plot(results: dict[str, Any], output: Path) -> None:
    from matplotlib.figure import Figure

    from samba_megatron.platform.files import atomic_write

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, suite, title in zip(
        figure.subplots(1, 2), SUITES, ("share of passkeys found", "perplexity"), strict=True
    ):
        for name, found in results.items():
            points = sorted((int(n), value) for n, value in _figures(found, suite).items())
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens", title=title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with atomic_write(output, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


if __name__ == "__main__":
    run_command(main)
