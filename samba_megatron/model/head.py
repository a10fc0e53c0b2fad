"""The output layer with the loss in it, for ``kernels.cross_entropy chunked``."""

from typing import Any, NamedTuple

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from samba_megatron.model.transformer_config import SambaTransformerConfig
from samba_megatron.ops.linear_cross_entropy import linear_cross_entropy


class SummedLosses(NamedTuple):
    """What the model gives where head and loss are one: their sum can be differentiated, each
    token's loss cannot (asking for it raises)."""

    total: Tensor
    """Σ loss · loss mask, a scalar."""
    each: Tensor
    """[b, s], constants."""


Losses = Tensor | SummedLosses
"""Of a model with labels: [b, s], or their sum where head and loss are one."""


class ChunkedHead(ColumnParallelLinear):
    """megatron's output layer, which given labels returns losses and never holds all logits.

    It is called as a module, so that whoever watches modules (the gather of parameters before they
    are used, the search for numbers that are not finite) sees it as it sees the other one. The
    weight keeps its name, its marks and its part of a checkpoint.

    Args:
        replaced: the output layer that megatron has built, whose weight this one takes.
        config: of the model.
    """

    fuse_wgrad_accumulation = False
    """Add the weight's gradient to megatron's gradient buffer; as Transformer Engine's linears have
    it, for :func:`~samba_megatron.training.data_parallel.fuse_gradient_accumulation`."""

    def __init__(self, replaced: ColumnParallelLinear, config: SambaTransformerConfig) -> None:
        super().__init__(
            replaced.input_size,
            replaced.output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=replaced.tp_group,
        )
        self.weight = replaced.weight  # None where it is the embedding's

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Any:
        """Without labels as megatron's: (logits, None).

        Args:
            input_: hidden states [s, b, d]; under sequence parallelism this rank's [s/tp, b, d].
            weight: the embedding's [V/tp, d], where it is tied.
            runtime_gather_output: of the logits.
            labels: [b, s].
            loss_mask: [b, s], what each token counts; 1 where not given.

        Returns:
            :class:`SummedLosses` where there are labels.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        total, losses = linear_cross_entropy(
            self._whole(input_),
            weight,
            labels.t(),
            None if loss_mask is None else loss_mask.t(),
            group=self.tp_group,
            into_main_grad=self.fuse_wgrad_accumulation and hasattr(weight, "main_grad"),
        )
        return SummedLosses(total, losses.t())

    def _whole(self, hidden: Tensor) -> Tensor:
        """[s, b, d] on every rank; backward the ranks' parts of the gradient are summed."""
        if self.sequence_parallel:
            # all-gather over tp; backward reduce-scatter
            return gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.tp_group
            )
        # as it is; backward all-reduce over tp
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
