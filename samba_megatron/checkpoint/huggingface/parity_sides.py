"""The two sides of a parity check, each for a process of its own.

``python -m … SIDE CHECKPOINT FOLDER DTYPE SCRATCH``: ``checkpoint`` leaves our model's logits in
SCRATCH, ``export`` loads the export with transformers and leaves its part of the report there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from samba_megatron.checkpoint.huggingface.shards import ShardReader
from samba_megatron.checkpoint.huggingface.source import CheckpointSource
from samba_megatron.checkpoint.huggingface.tensors import KEPT_IN_FP32
from samba_megatron.config import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig

TOLERANCE = 1e-4
"""Largest absolute difference of two fp32 logits."""
LOGITS, REPORT = "logits.pt", "report.json"
_KEPT = 128
"""Positions of a prompt whose logits are compared, from its end."""
_LONGEST = 4096


def prompts(model: ModelConfig) -> list[torch.Tensor]:
    """Fixed prompts [1, length]: two short ones, and one that leaves the window behind."""
    generator = torch.Generator().manual_seed(20240611)
    longest = min((model.window_size or 256) + 64, _LONGEST)
    return [
        torch.randint(0, model.vocab_size, (1, length), generator=generator)
        for length in (17, 64, longest)
    ]


def megatron_logits(checkpoint: Path, dtype: str, output: Path) -> None:
    """Saves the logits of our model, in fp32 with weights rounded to ``dtype``, for the prompts.

    In a process without process groups.
    """
    model, config = load_megatron(checkpoint)
    if dtype != "float32":
        for name, parameter in model.named_parameters():
            if not name.endswith(KEPT_IN_FP32):
                parameter.data = parameter.data.to(getattr(torch, dtype)).to(torch.float32)
    results = []
    with torch.no_grad():
        for tokens in prompts(config.model):
            positions = torch.arange(tokens.shape[1])[None]
            logits = model(tokens, positions, None)
            results.append(logits[:, -_KEPT:].float().clone())
    torch.save(results, output)


def load_megatron(checkpoint: Path) -> tuple[Any, RunConfig]:
    """The model of a checkpoint in fp32 on the local backend, in this process alone."""
    from samba_megatron.platform import distributed

    distributed.initialize(ParallelConfig())
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from samba_megatron.checkpoint.state import TrainState
    from samba_megatron.checkpoint.store import CheckpointStore
    from samba_megatron.model.samba import build_model

    model_parallel_cuda_manual_seed(1)
    config = RunConfig(model=CheckpointSource(checkpoint).config.model)
    config.precision.params_dtype = "fp32"
    config.kernels.transformer_impl = "local"
    chunks = build_model(config, "local")
    store = CheckpointStore(
        CheckpointConfig(load=str(checkpoint), load_weights_only=True, verify_on_load=False),
        notice=lambda text: None,
    )
    store.load(TrainState(model=chunks))
    return chunks[0].eval(), config


def compare_reloaded(checkpoint: Path, folder: Path, dtype: str, scratch: Path) -> dict[str, Any]:
    """Loads the export with transformers; ``tensors`` and ``logits`` of the report.

    In a process that has not imported transformers.
    """
    os.environ["HF_MODULES_CACHE"] = str(scratch / "modules")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto"
    ).eval()
    source = CheckpointSource(checkpoint)
    tensors = _compare_tensors(source, dict(model.state_dict()), dtype)
    expected = torch.load(scratch / LOGITS)
    result = {"transformers": transformers.__version__, "torch": torch.__version__}
    in_dtype = None
    if dtype != "float32":
        # Not the long prompt: many CPUs have no fast product of bf16 matrices.
        in_dtype = _differences(model, source.config.model, expected[:2])
    in_fp32 = _differences(model.float(), source.config.model, expected)
    compared: dict[str, Any] = {
        "prompt_lengths": [tokens.shape[1] for tokens in prompts(source.config.model)],
        **in_fp32,
        "tolerance": TOLERANCE,
        "passed": in_fp32["max_abs_difference"] <= TOLERANCE,
    }
    if in_dtype is not None:
        compared[f"in_{dtype}"] = in_dtype
    return {**result, "tensors": tensors, "logits": compared}


def compare_files(checkpoint: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Compares the tensors in an export's files with a checkpoint's, one at a time."""
    reader = ShardReader(folder)
    return _compare_tensors(CheckpointSource(checkpoint), _Lazily(reader), dtype)


class _Lazily:
    """A reader's tensors in the guise of a dictionary."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._names = reader.names

    def pop(self, name: str, default: None) -> torch.Tensor | None:
        if name not in self._names:
            return default
        self._names.discard(name)
        return self._reader.read(name)

    def __iter__(self) -> Any:
        return iter(set(self._names))


def _compare_tensors(source: CheckpointSource, found: Any, dtype: str) -> dict[str, Any]:
    different, compared = [], 0
    if source.config.model.share_embeddings_and_output_weights:
        found.pop("lm_head.weight", None)
    for link in source.links:
        wanted = torch.float32 if link.kept_in_fp32 else getattr(torch, dtype)
        for name, part in link.split(source.read(link).to(wanted)):
            compared += 1
            other = found.pop(name, None)
            if other is None or not _same_bits(part, other):
                different.append(name)
    different += sorted(found)
    return {"compared": compared, "different": different}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a_bits, b_bits = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a_bits, b_bits)


def _differences(model: Any, sizes: ModelConfig, expected: list[torch.Tensor]) -> dict[str, float]:
    largest = total = 0.0
    count = 0
    with torch.no_grad():
        for tokens, ours in zip(prompts(sizes), expected, strict=False):
            theirs = model(tokens, use_cache=False, logits_to_keep=_KEPT).logits.float()
            difference = (theirs - ours).abs()
            # A NaN must not pass for a small difference.
            largest = max(largest, float(difference.max().nan_to_num(nan=float("inf"))))
            total += float(difference.double().sum())
            count += difference.numel()
    return {"max_abs_difference": largest, "mean_abs_difference": total / count}


def main(side: str, checkpoint: str, folder: str, dtype: str, scratch: str) -> None:
    """Runs one side."""
    target = Path(scratch)
    if side == "checkpoint":
        megatron_logits(Path(checkpoint), dtype, target / LOGITS)
        return
    report = compare_reloaded(Path(checkpoint), Path(folder), dtype, target)
    (target / REPORT).write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
