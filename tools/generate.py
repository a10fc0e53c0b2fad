"""Continues a text with an exported model, token by token; says how fast and in how much memory.

    generate.py --model samba-hf --prompt "def main(" --max-new-tokens 100
    generate.py --model samba-hf --prompt-file story.txt --temperature 0.8 --top-p 0.95 --seed 7

The model is a Hugging Face folder (convert_checkpoint.py to-hf). Without --temperature the
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
class Speed:
    """What a continuation cost."""

    prompt_tokens: int
    first_seconds: float
    """Until the first new token."""
    new_tokens: int
    seconds: float
    """For all new tokens but the first."""
    cache_bytes: int
    """What the model remembers of the text at the end."""


def main() -> None:
    """Prints the prompt and its continuation, and a line of figures on stderr."""
    arguments = _parse()
    prompt = _prompt(arguments)
    model, tokenizer = _load(arguments)
    speed = _continue(model, tokenizer, prompt, arguments)
    rate = (speed.new_tokens - 1) / speed.seconds if speed.new_tokens > 1 else 0.0
    print(
        f"\n{speed.prompt_tokens:,} tokens read in {speed.first_seconds:.2f} s, "
        f"{speed.new_tokens:,} written at {rate:,.1f} tokens/s; "
        f"the cache holds {speed.cache_bytes / 1e6:,.2f} MB",
        file=sys.stderr,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--prompt-file", type=Path, help="a file with the text")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="at most (128)")
    parser.add_argument("--temperature", type=float, help="sample, with this temperature")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest (1.0)")
    parser.add_argument("--seed", type=int, default=1234, help="of the sampling (1234)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {arguments.max_new_tokens}: use 1 or more")
    if arguments.temperature is not None and arguments.temperature <= 0:
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


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    folder = arguments.model
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).exists():
            raise UserError(
                f"--model {folder} has no {name}: name a folder made by "
                "convert_checkpoint.py to-hf (with a tokenizer)"
            )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if arguments.device.startswith("cuda") and not cuda:
        raise UserError(f"--device {arguments.device}: this machine has no usable GPU; use cpu")
    device = ("cuda" if cuda else "cpu") if arguments.device == "auto" else arguments.device
    dtype = {"auto": "auto", "bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return model.to(device).eval(), tokenizer


def _continue(model: Any, tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> Speed:
    import torch
    from transformers import TextStreamer

    times: list[float] = []

    class Clock(TextStreamer):
        """Prints as tokens come, and notes when."""

        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise UserError("the tokenizer makes no token of the prompt: give it some text")
    torch.manual_seed(arguments.seed)
    sampling = arguments.temperature is not None
    options = {"temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    result = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=sampling,
        streamer=Clock(tokenizer, clean_up_tokenization_spaces=False),
        return_dict_in_generate=True,
        **(options if sampling else {}),
    )
    return Speed(
        prompt_tokens=length,
        first_seconds=times[1] - times[0],
        new_tokens=result.sequences.shape[1] - length,
        seconds=times[-1] - times[1],
        cache_bytes=result.past_key_values.memory(),
    )


if __name__ == "__main__":
    run_command(main)
