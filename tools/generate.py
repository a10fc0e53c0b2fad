"""Continues a text with a trained model, token by token; says how fast and in how much memory.

    generate.py --checkpoint runs/samba/checkpoints --prompt "def main(" --max-new-tokens 100
    generate.py --model samba-hf --prompt-file story.txt --temperature 0.8 --top-p 0.95 --seed 7

The model is a checkpoint of any layout, a folder of checkpoints (its latest), or a Hugging Face
folder. A prompt of any length is read in pieces, in the memory of one. Without --temperature the
likeliest token is taken each time.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_megatron.platform.errors import UserError, run_command


@dataclass(frozen=True)
class Cost:
    """What a continuation cost."""

    prompt_tokens: int
    first_seconds: float
    """Until the first new token."""
    new_tokens: int
    seconds: float
    """For all new tokens but the first."""
    cache_bytes: int | None
    """What the model remembers of the text at the end; None: it does not say."""
    device_bytes: int | None
    """The most that was held on a GPU, the weights included."""


def main() -> None:
    """Prints the prompt and its continuation, and a line of figures on stderr."""
    arguments = _parse()
    prompt = _prompt(arguments)
    device = _device(arguments.device)
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


def _device(wanted: str) -> str:
    import torch

    cuda = torch.cuda.is_available()
    if wanted.startswith("cuda") and not cuda:
        raise UserError(f"--device {wanted}: this machine has no usable GPU; use cpu")
    if wanted == "auto":
        wanted = "cuda" if cuda else "cpu"
    if wanted.startswith("cuda:"):
        torch.cuda.set_device(wanted)
    return wanted


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
    progress = _Progress(len(ids), arguments.piece)
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=model.device)
        cache, logits = read(model, tokens, arguments.piece, progress=progress)
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
        seconds=times[-1] - times[0],
        cache_bytes=memory() if memory else None,
        device_bytes=torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None,
    )


def _ends(subject: Any) -> set[int]:
    """Tokens after which there is nothing more."""
    named = subject.model.generation_config.eos_token_id
    more = named if isinstance(named, list) else [] if named is None else [named]
    return {subject.tokenizer.eod, *more}


class _Progress:
    """Says on stderr how far a prompt of several pieces is read; on a terminal in one line."""

    _PLAIN_SECONDS = 10.0

    def __init__(self, total: int, piece: int) -> None:
        self._total, self._long = total, total > piece
        self._started = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, count: int) -> None:
        """``count`` tokens are read."""
        if not self._long:
            return
        import torch

        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.monotonic()
        if self._terminal or now - self._last >= self._PLAIN_SECONDS or count == self._total:
            self._last = now
            self._print(count, now - self._started)

    def _print(self, count: int, seconds: float) -> None:
        rate = count / max(seconds, 1e-9)
        text = (
            f"read {count:,} of {self._total:,} tokens, {rate:,.0f} tokens/s, "
            f"{(self._total - count) / rate:.0f} s left"
        )
        whole = not self._terminal or count == self._total
        start = "\r\033[K" if self._terminal else ""
        print(start + text, end="\n" if whole else "", file=sys.stderr, flush=True)


def _report(cost: Cost) -> None:
    rate = (cost.new_tokens - 1) / cost.seconds if cost.new_tokens > 1 else 0.0
    parts = [
        f"{cost.prompt_tokens:,} tokens read, the first new one after {cost.first_seconds:.2f} s "
        f"({cost.prompt_tokens / cost.first_seconds:,.0f} tokens/s)",
        f"{cost.new_tokens:,} written at {rate:,.1f} tokens/s",
    ]
    if cost.cache_bytes is not None:
        parts.append(f"the cache holds {cost.cache_bytes / 1e6:,.2f} MB")
    if cost.device_bytes is not None:
        parts.append(f"at most {cost.device_bytes / 1e9:,.2f} GB of GPU memory")
    print("\n" + "; ".join(parts), file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
