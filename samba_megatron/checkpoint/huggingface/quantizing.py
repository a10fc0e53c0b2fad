"""Post-training quantisation of an export with NVIDIA's modelopt, as a Samba needs it.

The large matrices (in_proj and out_proj of the Mamba mixer, attention's four, the MLP's three)
are quantised. What is small or feeds the recurrence stays as it is: the convolution, x_proj and
dt_proj, whose errors the scan would carry on from token to token, norms, A_log, D, the embedding
and the head.
"""

import contextlib
import copy
import importlib.util
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from samba_megatron.checkpoint.huggingface import companions, quantized
from samba_megatron.checkpoint.huggingface.folders import finished_at_end, require_new
from samba_megatron.checkpoint.huggingface.loading import shipped_class
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import ExitWith, UserError
from samba_megatron.platform.exits import ExitCode

ALWAYS_KEPT = ("conv1d", "lm_head", "embeddings")
"""Parts of the names of modules that are never quantised; modelopt's presets spare them, too."""
KEPT = ("x_proj", "dt_proj")
"""Likewise of those that are spared unless ``keep`` says otherwise."""
REPORT = "quantization.json"
_BATCH = 4
_COPIED = ("generation_config.json",)


@dataclass(frozen=True)
class Format:
    """A number format, by modelopt's preset."""

    preset: str
    block: int | None = None
    """Inputs that share a scale: a matrix's width must be a multiple."""
    needs_gpu: bool = False


FORMATS = {
    "fp8": Format("FP8_DEFAULT_CFG"),
    "nvfp4": Format("NVFP4_DEFAULT_CFG", block=16, needs_gpu=True),
    "int8_sq": Format("INT8_SMOOTHQUANT_CFG"),
    "int4_awq": Format("INT4_AWQ_CFG", block=128),
}


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantise, and how."""

    model: Path
    """An export (``to-hf``)."""
    output: Path
    """Folder to make: absent or empty."""
    format: str
    calibration: Path
    """JSON lines with ``text``, or the prefix (or .bin) of an indexed dataset."""
    held_out: Path | None = None
    """Likewise, for the perplexity; a tenth of the calibration's blocks when unset."""
    keep: tuple[str, ...] = KEPT
    """Parts of the names of modules to spare, besides those that always are."""
    samples: int = 128
    """Blocks for calibration, at most."""
    length: int = 512
    """Tokens of a block."""
    device: str = "cpu"


def quantize(options: QuantizeOptions, notice: Callable[[str], None]) -> dict[str, Any]:
    """Calibrates, exports, reads the export back, and compares.

    Args:
        options: what to do.
        notice: gets sentences for people.

    Returns:
        The content of ``quantization.json``.

    Raises:
        UserError: nothing was written, because of what the message says.
        ExitWith: what was written does not read back as the same model.
    """
    kind = _check(options)
    require_new(options.output.absolute())
    model = _load(options)
    calibration, held_out = _blocks(options, model.config.vocab_size)
    keep = (*ALWAYS_KEPT, *options.keep)
    layers = _layers(model, keep)
    _require_blocks(layers, kind)
    notice(f"calibrating {len(layers)} matrices with {len(calibration)} blocks")
    report: dict[str, Any] = {"format": options.format, "kept": list(keep)}
    report["calibration_tokens"], report["held_out_tokens"] = (
        blocks.numel() for blocks in (calibration, held_out)
    )
    report["perplexity"] = {"before": perplexity(model, held_out)}
    original = _logits(model, held_out)
    _quantize(model, kind, keep, calibration)
    report["perplexity"]["after"] = perplexity(model, held_out)
    in_memory = _error(_logits(model, held_out), original)
    with finished_at_end(options.output) as folder:
        _export(model, options.model, folder)
        _compare_kept(options.model, folder, layers)
        read_back = quantized.load_dequantized(folder).to(options.device)
        report["perplexity"]["read_back"] = perplexity(read_back, held_out)
        from_files = _error(_logits(read_back, held_out), original)
        report["error"] = {"in_memory": in_memory, "read_back": from_files}
        report["bytes"] = {"before": _bytes(options.model), "after": _bytes(folder)}
        report["quantized"] = sorted(layers)
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
        # Unpacked wrongly, weights are noise: the error would be many times that of rounding.
        if not from_files <= 2 * in_memory + 1e-3:
            raise ExitWith(
                ExitCode.FAILED,
                f"the export reads back as another model (its logits are off by {from_files:.2f} "
                f"of their deviation, by {in_memory:.2f} before): it stays in {folder}",
            )
    return report


def _check(options: QuantizeOptions) -> Format:
    if options.format not in FORMATS:
        raise UserError(f"--format {options.format}: choose one of {', '.join(FORMATS)}")
    kind = FORMATS[options.format]
    if kind.needs_gpu and options.device == "cpu":
        raise UserError(
            f"--format {options.format} needs a GPU: modelopt rounds to its blocks in CUDA only"
        )
    if importlib.util.find_spec("modelopt") is None:
        raise UserError("nvidia-modelopt is not installed: uv pip install nvidia-modelopt")
    if not (options.model / "config.json").is_file():
        raise UserError(
            f"--model {options.model} has no config.json: name a folder made by "
            "convert_checkpoint.py to-hf"
        )
    return kind


def _load(options: QuantizeOptions) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = shipped_class(options.model).from_pretrained(options.model, dtype="auto")
    return model.to(options.device).eval()


# Data


def _blocks(options: QuantizeOptions, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [n, length] for calibration, and others for the perplexity."""
    tenth = max(1, options.samples // 10)
    wanted = options.samples + (0 if options.held_out else tenth)
    found = _read(options.calibration, options, wanted, vocab_size)
    if options.held_out is not None:
        return found, _read(options.held_out, options, tenth, vocab_size)
    held_out = max(1, len(found) // 11)
    if len(found) < 2:
        raise UserError(
            f"{options.calibration} gives one block of {options.length} tokens only: lower "
            "--length, or name other text with --held-out"
        )
    return found[:-held_out], found[-held_out:]


def _read(source: Path, options: QuantizeOptions, count: int, vocab_size: int) -> torch.Tensor:
    most = count * options.length
    if ".json" in source.name:
        tokens = _encoded(source, load_tokenizer(options.model), most)
    else:
        tokens = _indexed(source, most)
    whole = len(tokens) // options.length * options.length
    if not whole:
        raise UserError(f"{source} has fewer than {options.length} tokens: lower --length")
    if int(tokens.max()) >= vocab_size:
        raise UserError(
            f"{source} has the token {int(tokens.max())} and the model's vocabulary {vocab_size}: "
            "name data that were made with its tokenizer"
        )
    return tokens[:whole].view(-1, options.length).to(options.device)


def _encoded(source: Path, tokenizer: Tokenizer, most: int) -> torch.Tensor:
    from samba_megatron.data.jsonl import expand_inputs, read_texts

    tokens: list[int] = []
    for text in read_texts(expand_inputs([str(source)]), "text"):
        tokens += [*tokenizer.encode(text), tokenizer.eod]
        if len(tokens) >= most:
            break
    return torch.tensor(tokens[:most], dtype=torch.long)


def _indexed(source: Path, most: int) -> torch.Tensor:
    import numpy as np

    from samba_megatron.data.indexed import bin_path, check_dataset

    prefix = source.with_suffix("") if source.suffix == ".bin" else source
    info = check_dataset(prefix)
    content = np.memmap(bin_path(prefix), mode="r", dtype=info.dtype)
    return torch.from_numpy(content[:most].astype(np.int64))


# Quantising


def _layers(model: Any, keep: tuple[str, ...]) -> dict[str, torch.nn.Linear]:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in keep)
    }
    if not found:
        raise UserError(f"--keep {' '.join(keep)} leaves nothing to quantise: keep less")
    return found


def _require_blocks(layers: dict[str, torch.nn.Linear], kind: Format) -> None:
    for name, layer in layers.items():
        if kind.block and layer.in_features % kind.block:
            raise UserError(
                f"{name} has {layer.in_features} inputs, no multiple of this format's blocks of "
                f"{kind.block}: keep it with --keep, or choose another format"
            )


def _quantize(model: Any, kind: Format, keep: tuple[str, ...], blocks: torch.Tensor) -> None:
    with _quietly():
        import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, kind.preset))
    config["quant_cfg"] += [{"quantizer_name": f"*{part}*", "enable": False} for part in keep]

    def calibrate(model: Any) -> None:
        for batch in blocks.split(_BATCH):
            model(batch, use_cache=False)

    with _quietly(), torch.no_grad():
        mtq.quantize(model, config, calibrate)


def _export(model: Any, source: Path, folder: Path) -> None:
    with _quietly(), torch.inference_mode():
        from modelopt.torch.export import export_hf_checkpoint

        export_hf_checkpoint(model, export_dir=folder)
    content = json.loads((folder / "config.json").read_text())
    content["auto_map"] = json.loads((source / "config.json").read_text())["auto_map"]
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    companions.copy_code(folder)
    for name in (*companions.TOKENIZER_FILES, *_COPIED):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """modelopt prints what it does to every layer, and warns of what it finds when imported."""
    import warnings

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Checking


def _compare_kept(source: Path, folder: Path, layers: dict[str, torch.nn.Linear]) -> None:
    """What was not to be quantised must be there, bit by bit; norms may have taken up a scale."""
    before, after = quantized.read_tensors(source), quantized.read_tensors(folder)
    different = [
        name
        for name, tensor in before.items()
        if name.removesuffix(".weight") not in layers
        and not name.endswith("_norm.weight")
        and not (name in after and torch.equal(after[name], tensor))
    ]
    if different:
        raise RuntimeError(f"modelopt changed {', '.join(different[:3])}, which it was to keep")


def perplexity(model: Any, blocks: torch.Tensor) -> float:
    """exp(mean loss) over blocks [n, length]."""
    total = 0.0
    with torch.no_grad():
        for batch in blocks.split(_BATCH):
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                )
            )
    return math.exp(min(total / (blocks.shape[0] * (blocks.shape[1] - 1)), 700.0))


def _logits(model: Any, blocks: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(blocks[:1], use_cache=False).logits
    return logits.float().cpu()


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root of the mean squared difference, in deviations of what was expected."""
    return float((found - expected).square().mean().sqrt() / expected.std())


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
