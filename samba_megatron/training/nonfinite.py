"""Where the first number of a step is not finite: layer, tensor, micro-batch, rank and node.

Asked for when the loss or a gradient is found not to be finite, so that it may cost something: the
forward passes of the step are run once more, and every module's output is looked at. Where they are
finite, so are the losses; then the gradients in the buffers are searched from the head down, in
the order in which the backward pass has written them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from samba_megatron.platform import distributed
from samba_megatron.platform.hardware import node_name
from samba_megatron.training.layer_names import bare, layer_place, layer_title

_MOST_RANKS = 3
_Finding = tuple[list[int], str]
"""(order of appearance, what it is)."""


def locate(chunks: Sequence[Any], run_forward: Callable[[], list[dict[str, Tensor]]]) -> str:
    """What was not finite first and where, in words; every rank calls it.

    Args:
        chunks: this rank's model chunks in megatron's DDP wrapper.
        run_forward: the step's forward passes once more; returns the last stage's reports.
    """
    with torch.no_grad(), ExitStack() as stack:
        seen = [stack.enter_context(_watched(bare(chunk))) for chunk in chunks]
        reports = run_forward()
    finding = min(
        filter(None, (_first_output(chunk, s) for chunk, s in zip(chunks, seen, strict=True))),
        default=_first_loss(chunks, reports) or _last_gradient(chunks),
    )
    texts = distributed.gather_text(json.dumps([finding, node_name()]))
    found = [(json.loads(text), rank) for rank, text in enumerate(texts)]
    found = [((where, node), rank) for (where, node), rank in found if where]
    if not found:
        return "a second look at the step found everything finite"
    order, what = min(where for (where, _), _ in found)
    places = [(node, rank) for ((at, name), node), rank in found if (at, name) == (order, what)]
    shown = ", ".join(f"rank {rank} on {node}" for node, rank in places[:_MOST_RANKS])
    more = f" and {len(places) - _MOST_RANKS} more ranks" if len(places) > _MOST_RANKS else ""
    return f"first not finite: {what}, {shown}{more}"


@contextmanager
def _watched(chunk: Any) -> Iterator[list[tuple[str, Tensor]]]:
    """Inside, every module's output is noted: (name, whether it is finite), in order."""
    seen: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Any:
        def note(module: Any, inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]
            if tensors:
                seen.append((name, torch.stack([t.isfinite().all() for t in tensors]).all()))

        return note

    hooks = [module.register_forward_hook(noting(name)) for name, module in chunk.named_modules()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first_output(chunk: Any, seen: list[tuple[str, Tensor]]) -> _Finding | None:
    """The first module of a chunk whose output is not finite."""
    micro_batch = 0
    for name, finite in seen:
        if not name:  # the whole chunk: a micro-batch is through
            micro_batch += 1
        elif not bool(finite):
            number, within = layer_place(bare(chunk), name)
            title = layer_title(number, bare(chunk).layer_symbols)
            what = f"the output of {within or 'the whole'} in {title}, micro-batch {micro_batch}"
            return [0, micro_batch, number], what
    return None


def _first_loss(chunks: Sequence[Any], reports: list[dict[str, Tensor]]) -> _Finding | None:
    for micro_batch, report in enumerate(reports):
        if not bool(report["loss"].isfinite().all()):
            return [1, micro_batch, 0], f"the loss of micro-batch {micro_batch}"
    return None


def _last_gradient(chunks: Sequence[Any]) -> _Finding | None:
    """The gradient nearest to the head that is not finite."""
    found = []
    for chunk in chunks:
        for name, parameter in bare(chunk).named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not bool(gradient.isfinite().all()):
                number, within = layer_place(bare(chunk), name)
                title = layer_title(number, bare(chunk).layer_symbols)
                found.append(([2, -number, 0], f"the gradient of {within} in {title}"))
    return min(found, key=lambda each: each[0]) if found else None
