"""Figures about a run: what it is at the start, how fast each step was."""

import dataclasses
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from samba_megatron.config import RunConfig
from samba_megatron.model.samba import count_parameters, describe_model, flops_per_token
from samba_megatron.platform import distributed, hardware
from samba_megatron.training.setup import Run

_PACKAGES = (
    "samba-megatron",
    "torch",
    "megatron-core",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
    "flash-attn",
)


class Rates:
    """Turns tokens and seconds into tokens/s, TFLOP/s and utilisation.

    Model FLOPs (no recomputation), from the layers themselves, so attention counts the keys
    inside its window; hardware FLOPs count what is recomputed as well. MFU is of model FLOPs
    against the bf16 peak whatever the precision, the second figure against the peak of the
    precision used.
    """

    def __init__(self, config: RunConfig, world_size: int) -> None:
        parallel = config.parallel
        together = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        self.data_parallel_size = world_size // (together * parallel.context_parallel_size)
        self._devices = world_size
        flops = flops_per_token(config.model, config.data.sequence_length, parallel)
        self._flops, self._recomputing = flops.model, flops.hardware / flops.model
        name = hardware.device_name()
        self._bf16_peak = hardware.peak_flops(name, "bf16")
        self._used_peak = (
            hardware.peak_flops(name, "fp8") if config.precision.fp8 else self._bf16_peak
        )
        self.smoothed_tokens_per_second = 1.0
        self._first = True

    def of_step(self, tokens: int, seconds: float) -> dict[str, float | None]:
        """tokens/s of the whole run, model and hardware TFLOP/s a device, MFU (None where the peak
        is not known)."""
        rate = tokens / seconds
        self._smooth(rate)
        flops = rate * self._flops / self._devices
        return {
            "tokens_per_second": round(rate, 1),
            "tflops_per_device": round(flops / 1e12, 3),
            "hardware_tflops_per_device": round(flops * self._recomputing / 1e12, 3),
            "mfu": round(flops / self._bf16_peak, 4) if self._bf16_peak else None,
            "mfu_of_precision": round(flops / self._used_peak, 4) if self._used_peak else None,
        }

    def _smooth(self, rate: float) -> None:
        """A moving mean of about ten steps; the first step's warm-up is forgotten."""
        weight = 1.0 if self._first else 0.1
        self.smoothed_tokens_per_second += weight * (rate - self.smoothed_tokens_per_second)
        self._first = False


@dataclass(frozen=True)
class StartRecord:
    """What a run says of itself before the first step."""

    tables: list[tuple[str, list[tuple[str, str]]]]
    values: dict[str, Any]


def start_record(run: Run) -> StartRecord:
    """Model, layout, kernels, versions and the times of the set-up's phases."""
    config = run.config
    parallel = config.parallel
    layout = {
        "world_size": run.rank.world_size,
        "data_parallel_size": Rates(config, run.rank.world_size).data_parallel_size,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "recompute": parallel.recompute_granularity,
    }
    kernels = chosen_kernels(run)
    versions = {name: found for name in _PACKAGES if (found := _version(name))}
    phases = {name: round(seconds, 2) for name, seconds in run.phases.items()}
    values: dict[str, Any] = {
        "device": hardware.device_name(),
        "peak_tflops": _peaks(),
        "node": platform.node(),
        "parameters": count_parameters(config.model),
        "layout": layout,
        "kernels": kernels,
        "versions": versions,
        "phases": phases,
        "config": dataclasses.asdict(config),
        "run": {"steps": run.length.steps, "tokens": run.length.tokens, "resumed": run.resumed},
    }
    tables = [
        ("model", describe_model(config)),
        ("layout", [(name, str(value)) for name, value in layout.items()]),
        ("kernels", list(kernels.items())),
        ("data by source", run.train_dataset.summary()),
        ("start-up seconds", [(name, str(value)) for name, value in phases.items()]),
        ("run", _run_rows(run, values["device"])),
    ]
    return StartRecord(tables, values)


def _peaks() -> dict[str, float | None]:
    """Peak TFLOP/s of a device that utilisation is measured against, by precision."""
    gpu = hardware.gpu_in(hardware.device_name())
    return {kind: gpu.tflops.get(kind) if gpu else None for kind in ("bf16", "fp8")}


def _run_rows(run: Run, device: str) -> list[tuple[str, str]]:
    return [
        ("device", device),
        ("steps", f"{run.length.steps:,}"),
        ("tokens", f"{run.length.tokens:,}"),
        ("folder", str(run.run_dir)),
    ]


def chosen_kernels(run: Run) -> dict[str, str]:
    """Which implementation computes what in this run."""
    from samba_megatron.model.transformer_config import params_dtype
    from samba_megatron.training.optimizer import adam_implementation

    config, precision = run.config, run.config.precision
    kernels = {
        "transformer_impl": run.implementation,
        "params_dtype": str(params_dtype(config)).removeprefix("torch."),
        "fp8": f"{precision.fp8} ({precision.fp8_recipe})" if precision.fp8 else "off",
        "adam": adam_implementation(),
        "collectives": "nccl" if distributed.device_type() == "cuda" else "gloo",
    }
    return kernels | _op_backends(config, run.implementation)


def _op_backends(config: RunConfig, implementation: str) -> dict[str, str]:
    """The kernels that the dispatch takes for this run's tensors; a forced one that cannot serve
    them is refused here, before the first step."""
    from samba_megatron.model.transformer_config import params_dtype, tokens_at_once
    from samba_megatron.ops.causal_conv1d.dispatch import CAUSAL_CONV1D
    from samba_megatron.ops.linear_cross_entropy.dispatch import LINEAR_CROSS_ENTROPY
    from samba_megatron.ops.registry import AUTO, Request
    from samba_megatron.ops.selective_scan.dispatch import SELECTIVE_SCAN
    from samba_megatron.ops.swiglu.dispatch import SWIGLU
    from samba_megatron.ops.windowed_attention.dispatch import WINDOWED_ATTENTION

    model, kernels = config.model, config.kernels
    channels = model.d_inner // config.parallel.tensor_model_parallel_size
    documents = ["reset"] if config.data.reset_at_document_boundaries else []
    shared = config.parallel.context_parallel_size > 1
    carried = [*documents, "carry"] if shared else documents
    before = ["initial_state"] if shared and not documents else documents
    borrowed = [*documents, "halo"] if shared else documents

    def request(features: Sequence[str] = (), width: int = channels) -> Request:
        return Request(
            device=distributed.device_type(),
            dtype=params_dtype(config),
            features=frozenset(features),
            sizes={
                "channels": channels,
                "width": model.d_conv,
                "d_state": model.d_state,
                "head_dim": model.head_dim,
                "row": model.hidden_size,
                "span": width * tokens_at_once(config),
            },
        )

    chosen = {}
    if "M" in model.hybrid_layer_pattern:
        chosen["selective_scan"] = SELECTIVE_SCAN.choose(
            kernels.selective_scan, request(carried)
        ).name
    if "M" in model.hybrid_layer_pattern or model.short_convolution:
        # It reads the first half of a joined projection.
        asked = request(before, 2 * channels)
        chosen["causal_conv1d"] = CAUSAL_CONV1D.choose(kernels.causal_conv1d, asked).name
    if "-" in model.hybrid_layer_pattern:
        chosen["swiglu"] = SWIGLU.choose(kernels.swiglu, request()).name
    chosen["rms_norm"] = _norm(config, implementation, request())
    chosen |= _rotary(config, implementation, request())
    if kernels.cross_entropy == "chunked":
        asked = request(["vocabulary_parallel", "main_grad"])
        chosen["cross_entropy"] = f"chunked ({LINEAR_CROSS_ENTROPY.choose(AUTO, asked).name})"
    if implementation == "transformer_engine" and not (documents or shared):
        return {**chosen, "attention": "transformer_engine"}
    attention = WINDOWED_ATTENTION.choose(kernels.windowed_attention, request(borrowed)).name
    return {**chosen, "attention": attention}


def _norm(config: RunConfig, implementation: str, request: Any) -> str:
    from samba_megatron.model.backend import has_own_norm
    from samba_megatron.ops.rms_norm.dispatch import RMS_NORM

    if implementation == "transformer_engine" and not has_own_norm(config):
        return "transformer_engine"
    if config.precision.fp32_residual_connection:
        return "torch"
    return RMS_NORM.choose(config.kernels.rms_norm, request).name


def _rotary(config: RunConfig, implementation: str, request: Any) -> dict[str, str]:
    from samba_megatron.model.rotary import splits_and_rotates
    from samba_megatron.model.transformer_config import counts_rotary_in_32_bits
    from samba_megatron.ops.rotary.dispatch import ROTARY

    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    if not set("*F") & set(model.hybrid_layer_pattern) or model.position_embedding_type != "rope":
        return {}
    if splits_and_rotates(model, config.kernels, tensor):
        return {"rotary": ROTARY.choose(config.kernels.rotary, request).name}
    theirs = implementation == "transformer_engine" and counts_rotary_in_32_bits(config)
    return {"rotary": "transformer_engine" if theirs else "megatron"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
