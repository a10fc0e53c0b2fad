"""Measures reading prompts and writing long texts: Samba against a Transformer of its size.

    benchmark_generation.py --output generation
    benchmark_generation.py --output generation --recipe samba_421m --baseline llama2_438m

Both models have random weights and run through the code shipped with exports, with its kernels.
A prompt is read in one forward pass. Writing is not done for hours: one token's time is measured
with so many tokens in the cache, at several such positions, and integrated over the positions
between (linear from one to the next). Table, JSON and plot go to the output folder.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from samba_megatron.platform.distributed import chosen_device
from samba_megatron.platform.errors import UserError, run_command

PAPER = {"prompt": (131072, 3.73), "decode": (65536, 3.64)}
"""Length and ratio that the paper (arXiv 2406.07522, section 1) claims for 1.7B on one A100."""
_STEPS = 16
"""Tokens that are timed at a position."""


def main() -> None:
    """Measures, and writes what was found."""
    arguments = _parse()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = _measure(arguments)
    _write(results, arguments.output)
    print((arguments.output / "generation.md").read_text())
    print(f"in {arguments.output}: generation.md, generation.json, generation.png")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the results")
    add("--recipe", default="samba_1.7b", help="recipe of the model (samba_1.7b)")
    add("--baseline", default="llama3_1.6b", help="recipe that it is compared with (llama3_1.6b)")
    lengths = [4096, 8192, 16384, 32768, 65536, 131072]
    add("--prompt-lengths", type=int, nargs="+", default=lengths, help="tokens (4K…128K)")
    add("--prompt-batch", type=int, default=1, help="prompts at a time (1)")
    lengths = [64, 256, 1024, 4096, 16384, 65536]
    add("--decode-lengths", type=int, nargs="+", default=lengths, help="tokens (64…64K)")
    positions = [64, 1024, 2048, 4096, 16384, 32768, 65536]
    add("--positions", type=int, nargs="+", default=positions, help="where a token is timed")
    add("--decode-batch", type=int, default=16, help="texts at a time (16)")
    add("--dtype", choices=("bf16", "fp32"), default="bf16")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    add("--time-limit", type=float, default=240, help="seconds; then what is left is left out")
    arguments = parser.parse_args()
    for name in ("prompt_lengths", "prompt_batch", "decode_lengths", "positions", "decode_batch"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise UserError(f"--{name.replace('_', '-')}: give whole numbers of 1 or more")
    if arguments.time_limit <= 0:
        raise UserError(f"--time-limit {arguments.time_limit}: give seconds, more than 0")
    return arguments


# Measuring


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    import torch

    device = chosen_device(arguments.device)
    clock = _Clock(device, started + arguments.time_limit)
    recipes = {"model": arguments.recipe, "baseline": arguments.baseline}
    models = {role: _build(recipe, device, arguments.dtype) for role, recipe in recipes.items()}
    names = {role: Path(recipe).name.removesuffix(".yaml") for role, recipe in recipes.items()}
    _say(f"built {' and '.join(names.values())}")
    with torch.no_grad():
        batch, positions = _positions(models, arguments, clock)
        prompts = _prompts(models, arguments, clock)
    results = {
        "date": str(date.today()),
        "device": torch.cuda.get_device_name() if device != "cpu" else "CPU",
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "kernels": _kernels() if device != "cpu" else [],
        "recipes": names,
        "parameters": {
            role: sum(p.numel() for p in model.parameters()) for role, model in models.items()
        },
        "prompt_batch": arguments.prompt_batch,
        "decode_batch": batch,
        "notes": clock.notes,
        "prompts": prompts,
        "positions": positions,
        "decoding": {
            how: [_decoding(n, positions, how) for n in arguments.decode_lengths]
            for how in ("eager", "graph")
            if positions and all(how in point["model"] for point in positions)
        },
    }
    results["seconds"] = round(time.monotonic() - started, 1)
    return results


def _build(recipe: str, device: str, dtype: str) -> Any:
    """The shipped class with random weights, of a recipe's sizes."""
    import torch

    from samba_megatron.checkpoint.huggingface.fields import SAMBA, to_fields
    from samba_megatron.checkpoint.huggingface.shipped import configuration_samba, modeling_samba
    from samba_megatron.checkpoint.huggingface.tensors import KEPT_IN_FP32
    from samba_megatron.config.load import parse_run_config

    sizes = parse_run_config(["--config", recipe]).model
    fields = to_fields(sizes, 131072, {})
    kind = "Samba" if fields.pop("model_type") == SAMBA else "SambaHybrid"
    config = getattr(configuration_samba, f"{kind}Config")(**fields)
    torch.manual_seed(1)
    with torch.device(device):
        model = getattr(modeling_samba, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if dtype == "bf16" and not name.endswith(KEPT_IN_FP32):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def _kernels() -> list[str]:
    from samba_megatron.checkpoint.huggingface.shipped import modeling_samba, operations_samba

    names = (
        *("selective_scan_fn", "causal_conv1d_fn", "step_kernels"),
        *("flash_attn_func", "flash_attn_with_kvcache"),
    )
    modules = (operations_samba, modeling_samba)
    return [name for name in names if any(getattr(m, name, None) is not None for m in modules)]


class _Clock:
    """Times work on a device, and knows when to stop."""

    def __init__(self, device: str, deadline: float) -> None:
        self.device, self._deadline = device, deadline
        self.notes: list[str] = []

    def left(self, what: str) -> bool:
        """Whether there is time for more; a note of what is left out if there is none."""
        if time.monotonic() < self._deadline:
            return True
        self.notes.append(f"left out for --time-limit: {what}")
        _say(self.notes[-1])
        return False

    def seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Mean seconds of one call, once the device is done with all before."""
        self._wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self._wait()
        return (time.perf_counter() - start) / repeats

    def _wait(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()


def _prompts(
    models: dict[str, Any], arguments: argparse.Namespace, clock: _Clock
) -> list[dict[str, Any]]:
    """Seconds to read a prompt of each length."""
    import torch

    points = []
    for length in sorted(arguments.prompt_lengths):
        if not clock.left(f"prompts of {length:,} tokens and more"):
            break
        point: dict[str, Any] = {"tokens": length}
        for role, model in models.items():
            shape = (arguments.prompt_batch, length)
            ids = torch.randint(0, model.config.vocab_size, shape, device=clock.device)

            def read(model: Any = model, ids: Any = ids) -> None:
                model(ids, use_cache=True, logits_to_keep=1)

            try:
                first = clock.seconds(read, 1)
                # The first pass finds kernels and memory; a long one is what it is.
                point[role] = min(first, clock.seconds(read, 3 if first < 0.3 else 1))
            except torch.cuda.OutOfMemoryError:
                clock.notes.append(f"out of memory: {role}, a prompt of {length:,} tokens")
                torch.cuda.empty_cache()
        points.append(point)
        _say(f"prompt of {length:,}: {_rates(point, arguments.prompt_batch * length)}")
    return points


def _positions(
    models: dict[str, Any], arguments: argparse.Namespace, clock: _Clock
) -> tuple[int, list[dict[str, Any]]]:
    """Seconds a token at each position, and the batch that fits in memory with both models."""
    import torch

    batch = arguments.decode_batch
    while True:
        try:
            return batch, _tokens(models, sorted(arguments.positions), batch, clock)
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise UserError("not even one text fits in memory: lower --positions") from None
        torch.cuda.empty_cache()
        batch //= 2
        clock.notes.append(f"out of memory: both models write {batch} texts at a time")
        _say(clock.notes[-1])


def _tokens(
    models: dict[str, Any], positions: list[int], batch: int, clock: _Clock
) -> list[dict[str, Any]]:
    points = []
    for position in positions:
        if not clock.left(f"tokens after {position:,} and more"):
            break
        point: dict[str, Any] = {"position": position}
        for role, model in models.items():
            point[role] = _token_seconds(model, position, batch, clock)
        points.append(point)
        for how in point["model"]:
            seconds = {role: point[role].get(how) for role in models}
            _say(f"a token after {position:,}, {how}: {_rates(seconds, batch)}")
    return points


def _token_seconds(model: Any, position: int, batch: int, clock: _Clock) -> dict[str, float]:
    """Of a token for each text: ``eager`` as ``generate()`` calls it, ``graph`` without Python."""
    import torch

    from samba_megatron.evaluation.writing import captured

    cache = _filled(model, position, batch, clock.device)
    ids = torch.randint(0, model.config.vocab_size, (batch, 1), device=clock.device)

    def step() -> None:
        model(ids, past_key_values=cache, use_cache=True)

    for _ in range(3):
        step()
    found = {"eager": clock.seconds(step, _STEPS)}
    if clock.device != "cpu":
        try:
            # A replay repeats the same step in the same slots of the cache: the same time.
            graph = captured(step)
            graph.replay()
            found["graph"] = clock.seconds(graph.replay, _STEPS)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            clock.notes.append(f"no CUDA graph: {str(error).splitlines()[0]}")
    return found


def _filled(model: Any, position: int, batch: int, device: str) -> Any:
    """A cache as after ``position`` tokens; what it holds are random numbers."""
    import torch

    from samba_megatron.checkpoint.huggingface.shipped import cache_samba

    config, dtype = model.config, model.get_input_embeddings().weight.dtype
    cache = cache_samba.SambaCache(config, slots=position + 2 * _STEPS)
    heads, dim = config.attention_kv_heads, config.attention_head_dim
    for state in cache.states:
        if isinstance(state, cache_samba.MambaState):
            channels = config.intermediate_size
            taps = config.conv_kernel - 1
            state.conv = torch.randn(batch, channels, taps, dtype=dtype, device=device)
            state.scan = torch.randn(batch, channels, config.state_size, device=device)
            continue
        kept = position if state.window is None else min(position, state.window)
        keys = torch.randn(batch, heads, kept, dim, dtype=dtype, device=device)
        state.extend(keys, keys, torch.ones(batch, kept, dtype=torch.bool, device=device))
        state.seen = position
    cache.seen = position
    return cache


def _decoding(length: int, positions: list[dict[str, Any]], how: str) -> dict[str, Any]:
    """Seconds to write ``length`` tokens after an empty prompt, by the times at the positions."""
    total: dict[str, Any] = {"tokens": length}
    if length <= positions[-1]["position"]:
        for role in ("model", "baseline"):
            points = [(point["position"], point[role][how]) for point in positions]
            total[role] = integral(points, length)
    return total


def integral(points: list[tuple[int, float]], end: int) -> float:
    """Of the line through the points (x rising) from 0 to ``end``; level before the first point."""
    first, level = points[0]
    area = level * min(end, first)
    for (left, low), (right, high) in itertools.pairwise(points):
        if end <= left:
            break
        stop = min(end, right)
        value = low + (high - low) * (stop - left) / (right - left)
        area += (stop - left) * (low + value) / 2
    return area


# Reporting


def _rates(seconds: dict[str, Any], tokens: int) -> str:
    found = [
        f"{role} {tokens / seconds[role]:,.0f} tokens/s"
        for role in ("model", "baseline")
        if seconds.get(role)
    ]
    return ", ".join(found) + f", ratio {_ratio(seconds)}"


def _ratio(seconds: dict[str, Any]) -> str:
    if not seconds.get("model") or not seconds.get("baseline"):
        return "–"
    return f"{seconds['baseline'] / seconds['model']:.2f}"


def _write(results: dict[str, Any], output: Path) -> None:
    from samba_megatron.platform.files import write_text

    write_text(output / "generation.json", json.dumps(results, indent=1) + "\n")
    write_text(output / "generation.md", _table(results))
    _plot(results, output / "generation.png")


def _table(results: dict[str, Any]) -> str:
    names = results["recipes"]
    sizes = {role: f"{count / 1e6:,.0f}M" for role, count in results["parameters"].items()}
    lines = [
        f"{results['device']}, {results['date']}, torch {results['torch']}, {results['dtype']}; "
        f"kernels: {', '.join(results['kernels']) or 'torch'}.",
        f"{names['model']} ({sizes['model']}) against {names['baseline']} ({sizes['baseline']}), "
        "random weights, tokens/s.",
        *results["notes"],
        *("", f"Reading prompts, {results['prompt_batch']} at a time:", ""),
        *_rows(names, "prompt", results["prompts"], results["prompt_batch"]),
    ]
    hows = {"eager": "each step launched from Python", "graph": "each step a CUDA graph"}
    for how, points in results["decoding"].items():
        lines += [
            "",
            f"Writing, {results['decode_batch']} texts at a time, {hows[how]}; a token's time was "
            f"measured after {', '.join(f'{p["position"]:,}' for p in results['positions'])} "
            "tokens and integrated:",
            "",
            *_rows(names, "decode", points, results["decode_batch"]),
        ]
    return "\n".join(lines) + "\n"


def _rows(names: dict[str, str], what: str, points: list[dict[str, Any]], batch: int) -> list[str]:
    length, claimed = PAPER[what]
    rows = [f"| tokens | {names['model']} | {names['baseline']} | ratio |", "|---|---|---|---|"]
    for point in points:
        tokens = point["tokens"]
        rates = [
            f"{batch * tokens / point[role]:,.0f}" if point.get(role) else "–"
            for role in ("model", "baseline")
        ]
        paper = f" (paper: {claimed})" if tokens == length else ""
        rows.append(f"| {tokens:,} | {' | '.join(rates)} | {_ratio(point)}{paper} |")
    return rows


def _plot(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    from samba_megatron.platform.files import atomic_write

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = {"Reading a prompt": (results["prompts"], results["prompt_batch"])}
    for how, points in results["decoding"].items():
        name = {"eager": "from Python", "graph": "CUDA graphs"}[how]
        panels[f"Writing, {name}"] = points, results["decode_batch"]
    for axes, (title, (points, batch)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for role, style in (("model", "o-"), ("baseline", "s--")):
            found = [(p["tokens"], batch * p["tokens"] / p[role]) for p in points if p.get(role)]
            if found:
                axes.plot(*zip(*found, strict=True), style, label=results["recipes"][role])
        both = [p for p in points if p.get("model") and p.get("baseline")]
        ratio = f"\n{_ratio(both[-1])} × at {both[-1]['tokens']:,} tokens" if both else ""
        axes.set(xlabel="tokens", ylabel="tokens/s", title=title + ratio, xscale="log")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
