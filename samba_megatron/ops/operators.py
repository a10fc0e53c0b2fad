"""Kernels of this project as operators of torch: compilers trace through them without a break, and
FLOP counters count them.

They are defined on a library, not by ``torch.library.custom_op``, which imports the compiler at the
first call and looks at each whether an output is an input. Operators must return new tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "samba_megatron"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]
) -> Any:
    """An operator ``torch.ops.samba_megatron.<name>``, without a gradient yet.

    Args:
        schema: name, arguments and what is returned, as torch writes it.
        run: computes it, on any device.
        fake: returns tensors of the same shapes, strides and dtypes, and computes nothing.
        flops: its floating-point operations, from the arguments, with shapes in the tensors' place.

    Returns:
        What to call.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    operator = getattr(getattr(torch.ops, NAMESPACE), name)

    def count(*arguments: Any, **output: Any) -> int:
        return flops(*arguments)

    register_flop_formula(operator)(count)
    return operator.default


def differentiate(
    operator: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    backward_operator: Any,
) -> None:
    """Gives an operator a gradient, which has none itself.

    Args:
        operator: the forward.
        setup_context: as of ``torch.library.register_autograd``.
        backward: likewise; calls the backward operator.
        backward_operator: an attempt to differentiate it is an error.
    """

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"{operator.name()} can be differentiated once, not twice")

    for name, function, setup in (
        (operator.name(), backward, setup_context),
        (backward_operator.name(), refuse, None),
    ):
        torch.library.register_autograd(name, function, setup_context=setup, lib=_LIBRARY)
