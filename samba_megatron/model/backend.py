"""The layer backends: which class is a linear, a norm, an attention. One choice, in one place."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from samba_megatron.config import RunConfig
from samba_megatron.platform.errors import UserError

Implementation = Literal["transformer_engine", "local"]


@dataclass(frozen=True)
class Backend:
    """The modules that layer specs are made of."""

    name: Implementation
    norm_column_linear: Any
    """Column-parallel linear; Transformer Engine's has the layer's norm in it."""
    row_linear: Any
    """Row-parallel linear."""
    layer_norm: Any
    """The norm before a layer where the linear does not contain it, else the identity."""
    final_norm: Any
    """The norm after the last layer."""
    core_attention: Any
    """Softmax attention of given q, k and v."""
    norm_apart: bool
    """Whether a layer's norm stands before the linear, not in it."""

    def fused_norm_keys(self, linear: str, norm: str) -> dict[str, str]:
        """Checkpoint keys: a norm inside ``linear`` is saved as if it stood alone as ``norm``."""
        if self.norm_apart:
            return {}
        return {f"{linear}.layer_norm_": f"{norm}."}


def choose_implementation(
    wanted: Literal["auto", "transformer_engine", "local"], device_type: str
) -> Implementation:
    """Resolves ``kernels.transformer_impl`` for this machine.

    Raises:
        UserError: if Transformer Engine is demanded where it cannot run.
    """
    installed = find_spec("transformer_engine") is not None
    if wanted == "auto":
        return "transformer_engine" if installed and device_type == "cuda" else "local"
    if wanted == "transformer_engine" and not (installed and device_type == "cuda"):
        why = "there is no GPU" if device_type != "cuda" else "it is not installed (make setup-gpu)"
        raise UserError(
            f"kernels.transformer_impl is transformer_engine, but {why}: use auto or local"
        )
    return wanted


def build_backend(implementation: Implementation, config: RunConfig) -> Backend:
    """The backend's modules; imports what it needs.

    Args:
        implementation: as :func:`choose_implementation` resolved it.
        config: the run's. Several ranks that share a sequence have this project's attention
            (Transformer Engine would cut it into pieces in its own order); a norm of this project,
            or one that is computed again, stands apart from its linear.

    Raises:
        UserError: Transformer Engine's norms are demanded where its linears are not used.
    """
    recomputed = config.parallel.recomputed_parts
    if implementation == "local" and config.kernels.rms_norm == "transformer_engine":
        raise UserError(
            "kernels.rms_norm transformer_engine needs Transformer Engine's linears, and it is not "
            "installed (make setup-gpu): use auto, triton or torch"
        )
    own_norm = has_own_norm(config)
    if implementation == "local":
        backend = _local()
    else:
        shared = config.parallel.context_parallel_size > 1
        backend = _transformer_engine(shared, own_norm or "layernorm" in recomputed)
    if (own_norm or implementation == "local") and not config.precision.fp32_residual_connection:
        from samba_megatron.model.layers.norm import RMSNormWithResidual

        backend = replace(backend, layer_norm=RMSNormWithResidual)
    return _letting_go(backend, recomputed)


def has_own_norm(config: RunConfig) -> bool:
    """Whether this project's norms stand before Transformer Engine's linears: unless told
    otherwise where their kernel can run, and the residual stream is not kept in fp32."""
    wanted = config.kernels.rms_norm
    if wanted != "auto":
        return wanted != "transformer_engine"
    import torch

    from samba_megatron.ops.registry import Request
    from samba_megatron.ops.rms_norm.triton_rms_norm import BACKEND

    request = Request("cuda", torch.bfloat16, sizes={"row": config.model.hidden_size})
    in_fp32 = config.precision.fp32_residual_connection
    return not in_fp32 and BACKEND.cannot_serve(request) is None


def _letting_go(backend: Backend, recomputed: Collection[str]) -> Backend:
    from samba_megatron.model.recomputation import dropping, recomputable_module

    if "layernorm" in recomputed:
        backend = replace(
            backend,
            norm_column_linear=dropping(backend.norm_column_linear),
            layer_norm=partial(recomputable_module, backend.layer_norm),
        )
    if {"mlp_act", "scan"} & set(recomputed):
        backend = replace(backend, row_linear=dropping(backend.row_linear))
    return backend


def _transformer_engine(context_parallel: bool, norm_apart: bool) -> Backend:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )
    from megatron.core.transformer.identity_op import IdentityOp

    from samba_megatron.model.layers.attention_modules import LocalCoreAttention
    from samba_megatron.model.layers.transformer_engine_attention import (
        TransformerEngineCoreAttention,
    )

    return Backend(
        name="transformer_engine",
        norm_column_linear=TEColumnParallelLinear
        if norm_apart
        else TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        layer_norm=TENorm if norm_apart else IdentityOp,
        final_norm=TENorm,
        core_attention=LocalCoreAttention if context_parallel else TransformerEngineCoreAttention,
        norm_apart=norm_apart,
    )


def _local() -> Backend:
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from samba_megatron.model.layers.attention_modules import LocalCoreAttention
    from samba_megatron.model.layers.norm import RMSNorm

    return Backend(
        name="local",
        norm_column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        layer_norm=RMSNorm,
        final_norm=RMSNorm,
        core_attention=LocalCoreAttention,
        norm_apart=True,
    )
