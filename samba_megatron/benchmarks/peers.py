"""Other packages' code for the same: kernels, and layers with their norm and residual.

Nothing of them is imported before it is measured; what is not installed is named.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from samba_megatron.benchmarks.timing import Outputs, move
from samba_megatron.config import ModelConfig
from samba_megatron.ops.measuring import on_gpu

Inputs = dict[str, Any]
Prepared = tuple[Callable[[], Outputs], Inputs]
"""The forward pass, and what gradients are wanted of."""

MAMBA_SSM, TRANSFORMER_ENGINE = ("mamba_ssm", "causal_conv1d"), ("transformer_engine",)
FLA = ("fla",)
FLA_ATTENTION = ("fla", "flash_attn")
FLA_MAMBA = ("fla", "mamba_ssm", "causal_conv1d")
"""Packages that a peer needs: fla's layers compute with the kernels of others, and without them its
Mamba goes one position at a time."""


def unavailable(packages: Sequence[str]) -> str | None:
    """Why a peer that needs these packages, its own first, cannot be measured here, or None."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing and missing[0] == packages[0]:
        return f"the package {missing[0]} is not installed"
    if not on_gpu():
        return f"{packages[0]}'s kernels need a GPU, and there is none"
    if missing:
        return f"{packages[0]} needs {' and '.join(missing)} for it, which is not installed"
    return None


@dataclass(frozen=True)
class Kernel:
    """A peer's kernel."""

    packages: Sequence[str]
    prepare: Callable[[Inputs, ModelConfig], Prepared]
    """Takes this project's inputs, and lays them out as the kernel wants them, outside the time."""


def _mamba_ssm_scan(inputs: Inputs, model: ModelConfig) -> Prepared:
    from samba_megatron.ops.selective_scan.benchmark import CALLS

    return CALLS["mamba_ssm"](inputs)


def _fla_conv(inputs: Inputs, model: ModelConfig) -> Prepared:
    from fla.modules.causal_conv1d import causal_conv1d

    leaves = {**inputs, "x": _batch_first(inputs["x"])}
    return lambda: causal_conv1d(**leaves, activation="silu")[0], leaves


def _fla_attention(inputs: Inputs, model: ModelConfig) -> Prepared:
    from fla.ops.attn import parallel_attn

    leaves = {name: _batch_first(tensor) for name, tensor in inputs.items()}
    return lambda: parallel_attn(**leaves, window_size=model.window_size), leaves


def _transformer_engine_attention(inputs: Inputs, model: ModelConfig) -> Prepared:
    """What the layers of the Transformer Engine backend run where a sequence is one document."""
    from transformer_engine.pytorch import DotProductAttention

    window = model.window_size
    attention = DotProductAttention(
        model.num_attention_heads,
        model.head_dim,
        num_gqa_groups=model.kv_heads,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=(-1, 0) if window is None else (window - 1, 0),
    )
    return lambda: attention(inputs["q"], inputs["k"], inputs["v"]), inputs


def _fla_swiglu(inputs: Inputs, model: ModelConfig) -> Prepared:
    from fla.modules.activations import swiglu

    gate, up = (move(half.contiguous()) for half in inputs["x"].detach().chunk(2, -1))
    return lambda: swiglu(gate, up), {"gate": gate, "up": up}


def _transformer_engine_norm(inputs: Inputs, model: ModelConfig) -> Prepared:
    from transformer_engine.pytorch import RMSNorm

    norm = RMSNorm(model.hidden_size, eps=model.layernorm_epsilon, dtype=inputs["x"].dtype)
    return lambda: norm(inputs["x"]), {"x": inputs["x"], "weight": norm.weight}


def _fla_norm(inputs: Inputs, model: ModelConfig) -> Prepared:
    from fla.modules import RMSNorm

    norm = RMSNorm(model.hidden_size, eps=model.layernorm_epsilon).to(inputs["x"])
    return lambda: norm(inputs["x"]), {"x": inputs["x"], "weight": norm.weight}


def _transformer_engine_rotary(inputs: Inputs, model: ModelConfig) -> Prepared:
    """What megatron's layers run, and the values laid as the attention of documents wants them."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    rotate = partial(apply_rotary_pos_emb, tensor_format="sbhd", fused=True)
    qkv, angles, head_dim = inputs["qkv"], inputs["angles"], model.head_dim

    def run() -> Outputs:
        q, k, v = qkv.split([qkv.shape[-1] - 2 * head_dim, head_dim, head_dim], dim=-1)
        q = q.reshape(*q.shape[:2], -1, head_dim)
        return rotate(q, angles), rotate(k, angles), v.contiguous()

    return run, {"qkv": qkv}


def _fla_loss(inputs: Inputs, model: ModelConfig) -> Prepared:
    from fla.modules import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss(reduction="sum")
    leaves = {"hidden": _batch_first(inputs["hidden"]), "weight": inputs["weight"]}
    target = inputs["target"].t().contiguous()
    return lambda: loss(leaves["hidden"], target, leaves["weight"]), leaves


def _batch_first(x: Tensor) -> Tensor:
    return move(x.detach().transpose(0, 1).contiguous())


KERNELS: dict[str, dict[str, Kernel]] = {
    "selective_scan": {"mamba_ssm, its own layout": Kernel(MAMBA_SSM[:1], _mamba_ssm_scan)},
    "causal_conv1d": {"fla": Kernel(FLA, _fla_conv)},
    "windowed_attention": {
        "Transformer Engine's layer": Kernel(TRANSFORMER_ENGINE, _transformer_engine_attention),
        "fla": Kernel(FLA, _fla_attention),
    },
    "swiglu": {"fla": Kernel(FLA, _fla_swiglu)},
    "rms_norm": {
        "Transformer Engine": Kernel(TRANSFORMER_ENGINE, _transformer_engine_norm),
        "fla": Kernel(FLA, _fla_norm),
    },
    "rotary": {"Transformer Engine": Kernel(TRANSFORMER_ENGINE, _transformer_engine_rotary)},
    "linear_cross_entropy": {"fla": Kernel(FLA, _fla_loss)},
}
"""By operation and what stands in the table."""


class Residual(nn.Module):
    """x + layer(norm(x)), as each of this project's layers computes it."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, d] → [b, s, d]."""
        y = self.layer(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


@dataclass(frozen=True)
class Layer:
    """A peer's layer of one of the pattern's letters."""

    packages: Sequence[str]
    build: Callable[[ModelConfig, torch.dtype], nn.Module]
    """On the GPU, its weights in the dtype but for what it keeps in fp32."""


def _mamba_ssm_mamba(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    from mamba_ssm import Mamba
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    like: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    mixer = Mamba(
        model.hidden_size,
        d_state=model.d_state,
        d_conv=model.d_conv,
        expand=model.expand,
        dt_rank=model.resolved_dt_rank,
        **like,
    )
    return Residual(RMSNorm(model.hidden_size, eps=model.layernorm_epsilon, **like), mixer)


def _fla_mamba(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    from fla.layers import mamba

    require_fast_path(mamba)
    mixer = mamba.Mamba(
        hidden_size=model.hidden_size,
        state_size=model.d_state,
        conv_kernel=model.d_conv,
        intermediate_size=model.d_inner,
        dt_rank=model.resolved_dt_rank,
        layer_idx=0,
    )
    return _fla_layer(model, mixer, dtype)


def require_fast_path(module: Any) -> None:
    """Refuses what fla's module of Mamba does where the kernels that it looked for did not load.

    Raises:
        ImportError: they did not.
    """
    if not module.is_fast_path_available:
        raise ImportError("fla's Mamba could not import mamba_ssm's kernels")


def _fla_attention_layer(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    from fla.layers.attn import Attention

    attention = Attention(
        hidden_size=model.hidden_size,
        num_heads=model.num_attention_heads,
        num_kv_heads=model.kv_heads,
        window_size=model.window_size,
        rope_theta=float(model.rotary_base),
        layer_idx=0,
    )
    return _fla_layer(model, attention, dtype)


def _fla_mlp(model: ModelConfig, dtype: torch.dtype) -> nn.Module:
    from fla.modules import GatedMLP

    mlp = GatedMLP(model.hidden_size, intermediate_size=model.ffn_hidden_size)
    return _fla_layer(model, mlp, dtype)


def _fla_layer(model: ModelConfig, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    from fla.modules import RMSNorm

    norm = RMSNorm(model.hidden_size, eps=model.layernorm_epsilon)
    made = Residual(norm, layer).to("cuda", dtype).train()
    for name in ("A_log", "D"):
        if hasattr(layer, name):
            getattr(layer, name).data = getattr(layer, name).data.float()
    return made


LAYERS: dict[str, dict[str, Layer]] = {
    "M": {"mamba_ssm": Layer(MAMBA_SSM, _mamba_ssm_mamba), "fla": Layer(FLA_MAMBA, _fla_mamba)},
    "*": {"fla": Layer(FLA_ATTENTION, _fla_attention_layer)},
    "-": {"fla": Layer(FLA, _fla_mlp)},
}
"""By the pattern's letter and what stands in the table."""
