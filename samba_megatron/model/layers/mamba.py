"""The Mamba-1 layer (``M``): its numbers, initial values and Megatron spec.

The module itself is in :mod:`samba_megatron.model.layers.mamba_mixer`.
"""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from samba_megatron.config import ModelConfig
from samba_megatron.model.initialization import Initializer, constant, linear_uniform, uniform
from samba_megatron.model.layers.base import (
    RecomputablePart,
    RowGroups,
    SavedActivations,
    linear_flops,
    norm_part,
)
from samba_megatron.ops.cost import conv_flops, scan_flops

if TYPE_CHECKING:
    import torch

    from samba_megatron.model.backend import Backend


class MambaKind:
    """Selective state space layer (Mamba, arXiv 2312.00752, sections 3.2-3.5)."""

    symbol = "M"
    name = "mamba"

    def parameters(self, model: ModelConfig) -> int:
        """Projections, convolution, A_log, D, dt_bias, and the norm."""
        d, e, r, n = model.hidden_size, model.d_inner, model.resolved_dt_rank, model.d_state
        projections = 2 * d * e + e * (r + 2 * n) + r * e + e * d
        return projections + e * (model.d_conv + 1) + e * n + e + e + d

    def unsplit_parameters(self, model: ModelConfig) -> int:
        """The norm."""
        return model.hidden_size

    def fp32_parameters(self, model: ModelConfig) -> int:
        """A_log, D and dt_bias."""
        return model.d_inner * (model.d_state + 2)

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """Matrix products, convolution and scan: linear in the sequence, so constant a token."""
        d, e, r, n = model.hidden_size, model.d_inner, model.resolved_dt_rank, model.d_state
        products = linear_flops(d, 2 * e) + linear_flops(e, r + 2 * n) + linear_flops(r, e)
        return products + linear_flops(e, d) + conv_flops(1, e, model.d_conv) + scan_flops(1, e, n)

    def linear_flops_per_token(self, model: ModelConfig) -> float:
        """The two large projections."""
        return linear_flops(model.hidden_size, 3 * model.d_inner)

    def recomputed_flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """All between the two large projections."""
        return self.flops_per_token(model, sequence_length) - self.linear_flops_per_token(model)

    def recomputable_parts(self, model: ModelConfig) -> dict[str, RecomputablePart]:
        """The convolution's output, the step sizes, the scan with its states, the norm's output."""
        e, r = model.d_inner, model.resolved_dt_rank
        return norm_part(model) | {
            "conv1d": RecomputablePart(2 * e, conv_flops(1, e, model.d_conv)),
            "dt_proj": RecomputablePart(e + r, linear_flops(r, e)),
            "scan": RecomputablePart(4 * e, scan_flops(1, e, model.d_state)),
        }

    def saved_activations(
        self, model: ModelConfig, recomputed: Collection[str] = ()
    ) -> SavedActivations:
        """The norm's input and output; x and z; the convolution's output, the step sizes and the
        fused scan's states (fp32, one in 32); the gated output."""
        d, e = model.hidden_size, model.d_inner
        mixed = {"conv1d": e, "dt_proj": e, "scan": 2 * e * model.d_state // 32}
        kept = 0 if "mamba" in recomputed else sum(mixed[n] for n in mixed if n not in recomputed)
        norm = 0 if "layernorm" in recomputed else d
        gated = 0 if "scan" in recomputed else e
        return SavedActivations(d, norm, inner=2 * e + kept, inner_operands=gated)

    def initializers(self, model: ModelConfig, num_layers: int) -> dict[str, Initializer]:
        """Mamba's own values: S4D-real A, unit D, log-uniform step sizes."""
        scale = 1 / math.sqrt(num_layers)
        return {
            "norm.weight": constant(1.0),
            "mixer.in_proj.weight": linear_uniform(model.hidden_size),
            "mixer.conv1d.weight": uniform(1 / math.sqrt(model.d_conv)),
            "mixer.conv1d.bias": uniform(1 / math.sqrt(model.d_conv)),
            "mixer.x_proj.weight": linear_uniform(model.d_inner),
            "mixer.dt_proj.weight": uniform(model.resolved_dt_rank**-0.5),
            "mixer.dt_proj.bias": _inverse_softplus_of_log_uniform(model),
            "mixer.A_log": _log_of_one_to_n,
            "mixer.D": constant(1.0),
            "mixer.out_proj.weight": linear_uniform(model.d_inner, scale),
        }

    def huggingface_names(self, model: ModelConfig) -> dict[str, str | RowGroups]:
        """The same names, as both follow the Mamba authors' code."""
        own = [name for name in self.initializers(model, 1) if name != "norm.weight"]
        return {"norm.weight": "mixer_norm.weight", **{name: name for name in own}}

    def spec(self, backend: "Backend") -> Any:
        """megatron's layer around our Mamba-1 mixer (megatron's own is Mamba-2 only)."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec

        from samba_megatron.model.layers.mamba_layer import SambaMambaLayer
        from samba_megatron.model.layers.mamba_mixer import MambaMixer, MambaMixerSubmodules

        return ModuleSpec(
            module=SambaMambaLayer,
            submodules=MambaLayerSubmodules(
                norm=backend.layer_norm,
                mixer=ModuleSpec(
                    module=MambaMixer,
                    submodules=MambaMixerSubmodules(
                        in_proj=backend.norm_column_linear, out_proj=backend.row_linear
                    ),
                ),
                mamba_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=backend.fused_norm_keys("mixer.in_proj", "norm"),
            ),
        )


def _log_of_one_to_n(tensor: "torch.Tensor", generator: "torch.Generator") -> None:
    """A_log [E, N]: log(1 … N) in every row (S4D-real)."""
    import torch

    tensor.copy_(torch.log(torch.arange(1, tensor.shape[1] + 1, dtype=torch.float32)))


def _inverse_softplus_of_log_uniform(model: ModelConfig) -> Initializer:
    """dt_bias [E] whose softplus is log-uniform in [dt_min, dt_max], at least dt_init_floor."""

    def fill(tensor: "torch.Tensor", generator: "torch.Generator") -> None:
        import torch

        low, high = math.log(model.dt_min), math.log(model.dt_max)
        dt = torch.exp(tensor.uniform_(low, high, generator=generator))
        dt = dt.clamp(min=model.dt_init_floor)
        tensor.copy_(dt + torch.log(-torch.expm1(-dt)))

    return fill
