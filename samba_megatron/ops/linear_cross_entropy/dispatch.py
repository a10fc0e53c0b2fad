"""The one entrance of head and loss: checks the call, chooses the kernel, runs it."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.ops.linear_cross_entropy import reference, torch_softmax, triton_softmax
from samba_megatron.ops.registry import AUTO, Operation, Request

LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy", [triton_softmax.BACKEND, torch_softmax.BACKEND, reference.BACKEND]
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    loss_weights: Tensor | None = None,
    group: ProcessGroup | None = None,
    into_main_grad: bool = False,
    chunk: int | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Σ loss_weights · (log Σ exp(logits) - logits[target]) over tokens; logits = hidden · weightᵀ.

    The sum is what can be differentiated, once: its gradients are made along with it, and a token's
    share of the weight's could not be told apart later. Without gradients (``torch.no_grad``, or
    inputs that want none) none are made. Half precision is for the logits and the operands of the
    products; softmax, losses and the sum of the weight's gradient are fp32.

    Args:
        hidden: [..., d].
        weight: [V, d]; the columns of the vocabulary that this rank has, in the order of ranks.
        target: whole numbers [...], of the whole vocabulary. A negative one is ignored: no loss, no
            gradient. One that is not in the vocabulary has a loss that is NaN.
        loss_weights: [...], 1 where not given; constants.
        group: the ranks that share the vocabulary and have the same hidden states. The gradient of
            these is then this rank's part of a sum.
        into_main_grad: add the weight's gradient to ``weight.main_grad`` in the backward pass, as
            megatron's linears do (``grad_added_to_main_grad``).
        chunk: tokens whose logits are held at once; chosen by their size where not given.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        The sum, a scalar; and each token's loss [...], constants. fp32, or fp64 where an input is.

    Raises:
        ValueError: shapes do not fit.
        UserError: the named backend is unknown or cannot run this call.
    """
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden must be [..., d] and weight [V, d], not {shapes}")
    if loss_weights is None:
        loss_weights = torch.ones_like(target, dtype=torch.float32)
    for name, tensor in {"target": target, "loss_weights": loss_weights}.items():
        if tensor.shape != hidden.shape[:-1]:
            wanted = list(hidden.shape[:-1])
            raise ValueError(f"{name} must be {wanted} as hidden, not {list(tensor.shape)}")
    if group is not None and group.size() == 1:
        group = None
    wanted_features = {"vocabulary_parallel": group is not None, "main_grad": into_main_grad}
    features = frozenset(name for name, wanted in wanted_features.items() if wanted)
    request = Request(device=hidden.device.type, dtype=hidden.dtype, features=features)
    total, losses = LINEAR_CROSS_ENTROPY.choose(backend, request).run(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        loss_weights.detach().reshape(-1),
        group=group,
        into_main_grad=into_main_grad,
        chunk=chunk,
    )
    return total, losses.view(target.shape)
