"""Weights of Transformer Engine's linears that are kept in FP8 (``precision.fp8_param_gather``).

Such a weight is a byte a number with scales beside it, and for the backward pass its transposed
copy. The truth is the optimizer's fp32 main parameters: the optimizer casts them after each update,
through bf16 as a linear would, and the data-parallel ranks gather bytes. So what is drawn at the
start must reach the main parameters uncast, what a checkpoint holds is made from them, and after
loading the weights are cast from them anew.

Nothing here asks for Transformer Engine where no weight is quantised.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MAIN = "optimizer.state.param."
"""Before a weight's key in a checkpoint: its main parameter."""


def is_quantized(tensor: Any) -> bool:
    """Whether ``tensor`` is one of Transformer Engine's quantised tensors."""
    from megatron.core.fp8_utils import is_float8tensor

    return bool(is_float8tensor(tensor))


def any_quantized(modules: "Iterable[Any]") -> bool:
    """Whether a parameter of these modules is."""
    return any(is_quantized(each) for module in modules for each in module.parameters())


def plain(tensor: "torch.Tensor") -> "torch.Tensor":
    """``tensor``, or the numbers in its nominal dtype (bf16) that a quantised one stands for."""
    if not is_quantized(tensor):
        return tensor
    quantized: Any = tensor
    numbers: torch.Tensor = quantized.dequantize()
    return numbers


def set_initial(parameter: "torch.Tensor", value: "torch.Tensor") -> None:
    """Writes the initial ``value`` (of the same shape, on any device) into a parameter.

    From a quantised one the optimizer takes its main parameter not by way of FP8: Transformer
    Engine keeps what it was made of (memory that nobody has written) on the CPU until then, and
    that is replaced, too.
    """
    if not is_quantized(parameter):
        parameter.copy_(value)
        return
    weight: Any = parameter
    rounded = value.to(parameter.dtype)
    weight.get_high_precision_init_val().copy_(rounded)
    # Delayed scaling remembers maxima, and already has that of the unwritten memory.
    amax = getattr(weight._get_quantizer(), "amax", None)
    if amax is not None:
        amax.zero_()
    parameter.copy_(rounded.to(parameter.device))


def cast_from_main(optimizer: Any, chunks: Sequence[Any]) -> None:
    """Casts the weights anew from the main parameters and gathers them; every rank calls it.

    Args:
        optimizer: what ``get_megatron_optimizer`` returned.
        chunks: this rank's model chunks in megatron's DDP wrapper; no gather may be under way.
    """
    import torch

    with torch.no_grad():
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part._copy_main_params_to_model_params()
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)


def make_room(weights: dict[str, Any]) -> None:
    """Gives a template to load into plain memory (bf16) in the place of quantised weights.

    Args:
        weights: sharded state dicts of model chunks, by name.
    """
    import torch

    for sharded in _quantized_entries(weights):
        old = sharded.data
        sharded.data = torch.empty(tuple(old.shape), dtype=old.dtype, device=old.device)


def put_main_values(weights: dict[str, Any], optimizer_state: Any) -> None:
    """Puts into sharded state dicts, in the place of quantised weights, what they were cast from:
    the main parameters in bf16, as a checkpoint holds them where weights are not quantised.

    Args:
        weights: sharded state dicts of model chunks, by name.
        optimizer_state: the optimizer's, with this rank's main parameters whole.

    Raises:
        KeyError: if one is not there.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    main = {
        sharded.key.removeprefix(_MAIN): sharded.data
        for sharded in nested_values(optimizer_state)
        if str(getattr(sharded, "key", "")).startswith(_MAIN)
    }
    for sharded in _quantized_entries(weights):
        sharded.data = main[sharded.key].to(sharded.data.dtype)


def _quantized_entries(weights: dict[str, Any]) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    entries = nested_values(weights)
    return [each for each in entries if is_quantized(getattr(each, "data", None))]
