"""What a trained model can do: perplexity by length, passkey, phonebook, lm-eval's tasks.

    evaluate.py --checkpoint runs/samba/checkpoints --suite passkey --output passkey
    evaluate.py --checkpoint samba-hf --suite perplexity --data corpus/held_out --output perplexity
    torchrun --nproc-per-node 8 evaluate.py --checkpoint samba-hf --suite phonebook --output book
    evaluate.py --checkpoint samba-hf --suite lm-eval --output lm-eval

Takes checkpoints of any layout and Hugging Face folders. With torchrun each rank does a part. Every
result is on disk at once: the same command goes on where an earlier one has stopped.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from samba_megatron.platform.distributed import Rank, chosen_device
from samba_megatron.platform.errors import ExitWith, UserError, run_command
from samba_megatron.platform.exits import ExitCode

SUITES = ("perplexity", "passkey", "phonebook", "lm-eval")


def main() -> None:
    """Runs the command."""
    arguments = _parse()
    rank = Rank.from_environment()
    if arguments.suite == "lm-eval":
        _lm_eval(arguments, rank)
        return
    from samba_megatron.evaluation.runs import evaluate, join_world, leave_world
    from samba_megatron.evaluation.subject import load_subject

    prompt = _prompt(arguments)
    device = chosen_device(arguments.device, rank.local_rank)
    subject = load_subject(arguments.checkpoint, arguments.tokenizer, device, arguments.dtype)
    suite = _suite(arguments, prompt, subject)
    suite.cases()
    join_world(rank)
    outcome = evaluate(suite, subject, arguments.output, rank, arguments.time_limit)
    leave_world(rank)
    if outcome is not None:
        _report(arguments, outcome)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="checkpoint, or Hugging Face folder")
    add("--suite", choices=SUITES, required=True)
    add("--output", type=Path, required=True, help="folder for results, table and picture")
    add("--tokenizer", type=Path, help="default: the one that the model names")
    add("--device", default="auto", help="auto, cpu or cuda (auto: a GPU a rank)")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="default: the weights'")
    add("--batch-size", type=int, help="cases at a time (passkey 5, phonebook 8, lm-eval 8)")
    add("--piece", type=int, default=16384, help="tokens read at a time (16384)")
    add("--time-limit", type=float, metavar="SECONDS", help="begin no case after so long")
    add("--seed", type=int, default=1234, help="of keys, names and numbers (1234)")
    add("--prompts", type=Path, help="YAML or JSON with other sentences for the prompts")
    add("--lengths", type=_numbers, help="tokens, as 4096,8192 (perplexity and passkey)")
    perplexity = parser.add_argument_group("perplexity")
    perplexity.add_argument("--data", help="prefix of a dataset, a text file or JSON lines")
    perplexity.add_argument("--text-key", default="text", help="of JSON lines (text)")
    perplexity.add_argument("--blocks", type=int, help="at most so many blocks (all)")
    passkey = parser.add_argument_group("passkey")
    passkey.add_argument("--depths", type=int, default=11, help="places of the key (11)")
    passkey.add_argument("--keys", type=int, default=5, help="keys a length and place (5)")
    phonebook = parser.add_argument_group("phonebook")
    phonebook.add_argument("--pairs", type=_numbers, help="sizes of the book, as 20,480,1850")
    phonebook.add_argument("--samples", type=int, default=128, help="books of each size (128)")
    harness = parser.add_argument_group("lm-eval")
    harness.add_argument("--tasks", help="as piqa,arc_easy (the paper's five)")
    harness.add_argument("--limit", type=int, help="questions a task, at most (all)")
    harness.add_argument("--task-folder", type=Path, help="folder with further tasks")
    arguments = parser.parse_args()
    for name in ("batch_size", "piece", "blocks", "depths", "keys", "samples", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: use 1 or more")
    return arguments


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{text!r} is not a list of numbers: write them as 4096,8192") from None
    if min(numbers) < 1:
        raise UserError(f"{text!r} holds a number below 1")
    return numbers


def _prompt(arguments: argparse.Namespace) -> Any:
    """The sentences of a retrieval suite: mistakes in them are found before the model is loaded."""
    if arguments.suite == "perplexity":
        if arguments.data is None:
            raise UserError("perplexity needs --data: the prefix of a dataset, or a file of text")
        return None
    from samba_megatron.evaluation.prompts import load_prompt

    return load_prompt(arguments.suite, arguments.prompts)


def _suite(arguments: argparse.Namespace, prompt: Any, subject: Any) -> Any:
    """The suite with what the command line says of it."""
    chosen = {
        name: getattr(arguments, name)
        for name in ("lengths", "pairs", "batch_size")
        if getattr(arguments, name) is not None
    }
    shared = {"seed": arguments.seed, "piece": arguments.piece, "prompt": prompt}
    if arguments.suite == "passkey":
        from samba_megatron.evaluation.passkey import Passkey

        chosen.pop("pairs", None)
        return Passkey(depths=arguments.depths, keys=arguments.keys, **shared, **chosen)
    if arguments.suite == "phonebook":
        from samba_megatron.evaluation.phonebook import Phonebook

        chosen.pop("lengths", None)
        return Phonebook(samples=arguments.samples, **shared, **chosen)
    from samba_megatron.evaluation.perplexity import LENGTHS, Perplexity

    return Perplexity(
        data=arguments.data,
        tokenizer=subject.tokenizer,
        lengths=arguments.lengths or LENGTHS,
        blocks=arguments.blocks,
        text_key=arguments.text_key,
        piece=arguments.piece,
    )


def _report(arguments: argparse.Namespace, outcome: Any) -> None:
    from rich.console import Console

    from samba_megatron.evaluation.charts import plot, table
    from samba_megatron.evaluation.runs import RESULTS

    picture = arguments.output / f"{arguments.suite}.png"
    Console().print(table(outcome.results))
    plot(outcome.results, picture)
    print(f"{arguments.output / RESULTS}, {picture}")
    if not outcome.finished:
        raise ExitWith(
            ExitCode.REQUEUE, "stopped at --time-limit: the same command does the cases left"
        )


def _lm_eval(arguments: argparse.Namespace, rank: Rank) -> None:
    from samba_megatron.evaluation.harness import (
        PAPER_TASKS,
        RESULTS,
        HarnessOptions,
        require_harness,
        run_harness,
    )

    require_harness(arguments.checkpoint)
    if rank.world_size > 1:
        raise UserError("lm-eval runs in one process here: start without torchrun")
    options = HarnessOptions(
        model=arguments.checkpoint,
        tasks=tuple(arguments.tasks.split(",")) if arguments.tasks else PAPER_TASKS,
        output=arguments.output,
        device=chosen_device(arguments.device, rank.local_rank),
        dtype={"auto": "auto", "bf16": "bfloat16", "fp32": "float32"}[arguments.dtype],
        batch_size=arguments.batch_size or 8,
        limit=arguments.limit,
        task_folder=arguments.task_folder,
    )
    for task, figures in run_harness(options).items():
        for name, value in figures.items():
            if isinstance(value, float):
                print(f"{task}  {name}  {value:.4f}")
    print(options.output / RESULTS, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
