"""Figures about a run: what it is at the start, how fast each step was."""

import dataclasses
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from samba_megatron.config import RunConfig
from samba_megatron.model.samba import count_parameters, describe_model, flops_per_token
from samba_megatron.platform import hardware
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
    kernels = run.kernels
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


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
