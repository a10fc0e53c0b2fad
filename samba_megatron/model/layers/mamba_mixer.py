"""A tensor-parallel Mamba-1 mixer for Megatron, with sequence parallelism.

Mamba (arXiv 2312.00752), figure 3 and algorithm 2. With E = expand * d channels, R = dt_rank,
N = d_state, and ``tp`` tensor-parallel ranks:

    x, z   = in_proj(h)                      [s, b, 2E/tp]   column-parallel, x and z split alike
    x      = silu(conv1d(x))                 [s, b, E/tp]    depthwise: local
    dt,B,C = x_proj(x)                       [s, b, R+2N]    split on its input: all-reduce
    dt     = dt_proj(dt)                     [s, b, E/tp]    split on its output
    y      = scan(x, dt, A, B, C, D) silu(z) [s, b, E/tp]    a channel at a time: local
    out    = out_proj(y)                     [s, b, d]       row-parallel

The all-reduce after x_proj is needed in **both** directions: forward because each rank holds a
part of the sum, backward because the reduced dt, B and C are used by every rank's own channels,
so their gradients are partial sums too. (A row-parallel linear there gives the right forward pass
and wrong gradients.) It moves R + 2N numbers a token: 144 + 32 at Samba 1.3B, against d = 2304
for a layer's other collectives.

Context parallelism gives each rank a contiguous piece of the sequence: s is what a rank has of it,
conv1d borrows the d_conv - 1 positions before it, and the scan's state is carried from rank to rank
(:mod:`samba_megatron.ops.context_parallel`). Everything else is a position at a time.

A_log, D, dt_bias, the softplus and the state are fp32 whatever the parameters' dtype; x_proj and
dt_proj stay out of FP8.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import Tensor, nn

from samba_megatron.model.layers.along_sequence import convolve, scan
from samba_megatron.model.recomputation import dropped, recomputable
from samba_megatron.model.sequence import SequenceParams, sequence_params
from samba_megatron.model.transformer_config import SambaTransformerConfig


@dataclass
class MambaMixerSubmodules:
    """The two large projections, by the layer backend."""

    in_proj: ModuleSpec | type
    out_proj: ModuleSpec | type


class ShardedParameters(MegatronModule):
    """Parameters under one name, split over the tensor-parallel ranks.

    Args:
        shapes: name → (local shape, split dimension, dtype).
    """

    def __init__(
        self,
        config: SambaTransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        shapes: dict[str, tuple[tuple[int, ...], int, torch.dtype]],
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.split_dims = {name: dim for name, (_, dim, _) in shapes.items()}
        for name, (shape, dim, dtype) in shapes.items():
            data = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
            parameter = nn.Parameter(data)
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            self.register_parameter(name, parameter)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """The parameters with their split, so that they load at any TP."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            self.split_dims,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class MambaMixer(ShardedParameters):
    """Mamba-1 selective state space mixer on [s, b, d].

    Args:
        config: sizes in ``config.model``, kernels in ``config.kernels``.
        submodules: in_proj and out_proj of the layer backend.
        d_model: width d.
        layer_number: global, from 1.
        pg_collection: process groups; ``tp`` and ``cp`` are used.
    """

    def __init__(
        self,
        config: SambaTransformerConfig,
        submodules: MambaMixerSubmodules,
        d_model: int,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int = 0,
        name: str | None = None,
    ) -> None:
        assert pg_collection is not None, "MambaMixer needs its process groups"
        model, tp = config.model, pg_collection.tp
        local = model.d_inner // tp.size()
        rank_dt, n, dtype = model.resolved_dt_rank, model.d_state, config.params_dtype
        super().__init__(
            config,
            tp,
            {"A_log": ((local, n), 0, torch.float32), "D": ((local,), 0, torch.float32)},
        )
        self.cp_group = pg_collection.cp
        self.dt_rank, self.d_state = rank_dt, n
        self.layer_number = layer_number
        self.in_proj = build_module(
            submodules.in_proj,
            d_model,
            2 * model.d_inner,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=tp,
            stride=2,
            name=f"{name}.in_proj" if name else None,
        )
        # The convolution's taps are [E, 1, width], as torch's Conv1d and the checkpoints of
        # mamba-ssm have them.
        self.conv1d = ShardedParameters(
            config,
            tp,
            {
                "weight": ((local, 1, model.d_conv), 0, dtype),
                "bias": ((local,), 0, dtype),
            },
        )
        self.x_proj = ShardedParameters(
            config, tp, {"weight": ((rank_dt + 2 * n, local), 1, dtype)}
        )
        self.dt_proj = ShardedParameters(
            config,
            tp,
            {"weight": ((local, rank_dt), 0, dtype), "bias": ((local,), 0, torch.float32)},
        )
        self.out_proj = build_module(
            submodules.out_proj,
            model.d_inner,
            d_model,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=tp,
            name=f"{name}.out_proj" if name else None,
        )

    def forward(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, d] → ([s, b, d], None); [s/tp, b, d] under sequence parallelism."""
        mix = partial(self.mix, sequence_params(packed_seq_params))
        xz, _ = self.in_proj(hidden_states)  # [s, b, 2E/tp]
        if self.config.recompute_mamba and self.training:
            y = tensor_parallel.checkpoint(mix, False, xz)
        else:
            y = mix(xz)
        return self.out_proj(y)

    def mix(self, sequence: SequenceParams, xz: Tensor) -> Tensor:
        """All between the two large projections: [s, b, 2E/tp] → [s, b, E/tp].

        What ``recompute_modules: [mamba]`` computes again in the backward pass: everything but
        the matrix products that cost. Where a document begins, the convolution and the state see
        nothing of the one before. ``conv1d``, ``dt_proj`` and ``scan`` let these results go.
        """
        kernels, place = self.config.kernels, f"layer {self.layer_number}"
        parts = self.config.recompute_parts
        x, z = xz.chunk(2, dim=-1)
        x = convolve(
            x,
            self.conv1d.weight,
            self.conv1d.bias,
            sequence,
            self.cp_group,
            f"{place} conv1d",
            kernels.causal_conv1d,
            recompute="conv1d" in parts,
        )
        with dropped(x):
            dt, b, c = self.project_to_dt_b_c(x)
        widen = partial(recomputable, F.linear) if "dt_proj" in parts else F.linear
        delta = widen(dt, self.dt_proj.weight)
        with dropped(x, delta):
            return scan(
                x,
                delta,
                -torch.exp(self.A_log),
                b,
                c,
                sequence,
                self.cp_group,
                f"{place} state",
                recompute="scan" in parts,
                D=self.D,
                z=z,
                delta_bias=self.dt_proj.bias,
                delta_softplus=True,
                backend=kernels.selective_scan,
            )

    def project_to_dt_b_c(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [s, b, E/tp] → dt [s, b, R], B and C [s, b, N], whole on every rank."""
        part = F.linear(x, self.x_proj.weight)  # [s, b, R+2N], of the sum
        summed = tensor_parallel.reduce_from_tensor_model_parallel_region(part, group=self.tp_group)
        shared = tensor_parallel.copy_to_tensor_model_parallel_region(summed, group=self.tp_group)
        dt, b, c = torch.split(shared, [self.dt_rank, self.d_state, self.d_state], dim=-1)
        return dt, b, c

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """Own parameters and submodules; in_proj's x and z halves are split apart."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        result = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, module in self.named_children():
            result.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        key = f"{prefix}in_proj.weight"
        result[key] = apply_swiglu_sharded_factory(
            result[key],
            sharded_offsets,
            metadata.get("singleton_local_shards", False),
            tp_group=self.tp_group,
            dp_group=metadata["dp_cp_group"],
        )
        return result
