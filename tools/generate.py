"""Continues a text with a trained model, token by token; says how fast and in how much memory.

    generate.py --checkpoint runs/samba/checkpoints --prompt "def main(" --max-new-tokens 100
    generate.py --model samba-hf --prompt-file story.txt --temperature 0.8 --top-p 0.95 --seed 7

The model is a checkpoint of any layout, a folder of checkpoints (its latest), or a Hugging Face
folder. A prompt of any length is read in pieces, in the memory of one. Without --temperature the
likeliest token is taken each time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from samba_megatron.platform.distributed import chosen_device
from samba_megatron.platform.errors import UserError, run_command
from samba_megatron.platform.progress import Progress


@dataclass(frozen=True)
class Cost:
    """What a continuation cost."""

    prompt_tokens: int
    first_seconds: float
    """Until the first new token."""
    new_tokens: int
    token_seconds: float | None
    """Median from one new token to the next: the first ones compile kernels. None: there is one."""
    cache_bytes: int | None
    """What the model remembers of the text at the end; None: it does not say."""
    device_bytes: int | None
    """The most that was held on a GPU, the weights included."""


def main() -> None:
    """Prints the prompt and its continuation, and a line of figures on stderr."""
    arguments = _parse()
    prompt = _prompt(arguments)
    device = chosen_device(arguments.device)
    from samba_megatron.evaluation.subject import load_subject

    subject = load_subject(arguments.checkpoint, arguments.tokenizer, device, arguments.dtype)
    _report(_continue(subject, prompt, arguments))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="checkpoint, or Hugging Face folder")
    model.add_argument("--model", type=Path, dest="checkpoint", help="the same")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--prompt-file", type=Path, help="a file with the text")
    add("--tokenizer", type=Path, help="default: the one that the model names")
    add("--max-new-tokens", type=int, default=128, help="at most (128)")
    add("--temperature", type=float, help="sample, with this temperature")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest (1.0)")
    add("--seed", type=int, default=1234, help="of the sampling (1234)")
    add("--piece", type=int, default=16384, help="tokens of the prompt read at a time (16384)")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="default: the weights'")
    add("--no-cuda-graph", action="store_true", help="on a GPU: Python launches each token")
    arguments = parser.parse_args()
    for name in ("max_new_tokens", "piece"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(arguments, name)}: use 1 or more")
    if arguments.temperature is not None and not arguments.temperature > 0:
        raise UserError("--temperature must be over 0: leave it out to take the likeliest token")
    if not 0 < arguments.top_p <= 1:
        raise UserError(f"--top-p is {arguments.top_p}: use a number over 0, 1 at most")
    return arguments


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        text = arguments.prompt
    else:
        try:
            text = arguments.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"--prompt-file {arguments.prompt_file}: {problem}") from None
    if not text:
        raise UserError("the prompt is empty: give at least a character to continue")
    return str(text)


def _continue(subject: Any, prompt: str, arguments: argparse.Namespace) -> Cost:
    """Prints the text as it comes."""
    import torch

    from samba_megatron.evaluation.reading import read
    from samba_megatron.evaluation.writing import Continuation, Sampling, as_text

    model, tokenizer = subject.model, subject.require_tokenizer()
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the tokenizer makes no token of the prompt: give it some text")
    torch.manual_seed(arguments.seed)
    started, count = time.perf_counter(), arguments.max_new_tokens
    tokens = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        cache, logits = read(model, tokens, arguments.piece, progress=_progress(tokens))
    sampling = Sampling(arguments.temperature, arguments.top_p)
    writer = Continuation(model, cache, logits, sampling, count)
    graph = model.device.type == "cuda" and not arguments.no_cuda_graph
    times: list[float] = []
    ends = _ends(subject)

    def written() -> Any:
        for (token,) in writer.tokens(count, graph):
            times.append(time.perf_counter())
            if token in ends:
                return
            yield token

    print(prompt, end="", flush=True)
    for text in as_text(tokenizer, ids, written()):
        print(text, end="", flush=True)
    print(flush=True)
    memory = getattr(writer.cache, "memory", None)
    return Cost(
        prompt_tokens=len(ids),
        first_seconds=times[0] - started,
        new_tokens=len(times),
        token_seconds=statistics.median(b - a for a, b in pairwise(times)) if times[1:] else None,
        cache_bytes=memory() if memory else None,
        device_bytes=torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None,
    )


def _ends(subject: Any) -> set[int]:
    """Tokens after which there is nothing more."""
    named = subject.model.generation_config.eos_token_id
    more = named if isinstance(named, list) else [] if named is None else [named]
    return {subject.tokenizer.eod, *more}


def _progress(tokens: Any) -> Callable[[int], None]:
    """Of reading them; only if it takes more than one piece."""
    import torch

    total = tokens.shape[1]
    lines = Progress(
        total, lambda done, rate: f"read {done:,} of {total:,} tokens, {rate:,.0f} tokens/s", True
    )

    def add(count: int) -> None:
        if count < total:
            if tokens.is_cuda:
                torch.cuda.synchronize()
            lines.add(count)

    return add


def _report(cost: Cost) -> None:
    parts = [
        f"{cost.prompt_tokens:,} tokens read, the first new one after {cost.first_seconds:.2f} s "
        f"({cost.prompt_tokens / cost.first_seconds:,.0f} tokens/s)",
        f"{cost.new_tokens:,} written"
        + (f" at {1 / cost.token_seconds:,.1f} tokens/s" if cost.token_seconds else ""),
    ]
    if cost.cache_bytes is not None:
        parts.append(f"the cache holds {cost.cache_bytes / 1e6:,.2f} MB")
    if cost.device_bytes is not None:
        parts.append(f"at most {cost.device_bytes / 1e9:,.2f} GB of GPU memory")
    print("\n" + "; ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
