"""Norms of each layer's weights and gradients and the size of its output, on chosen steps.

Whatever the layout, the figures are the whole model's: each rank adds what is its own, and one
reduction sums it. Weights count once over data-parallel ranks; of the gradients a rank has the part
that the reduction left it, as the distributed optimizer takes it. So the gradients' norms make up
the step's gradient norm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from samba_megatron.model.fp8_weights import plain
from samba_megatron.platform import distributed
from samba_megatron.training.layer_names import bare, layer_place, layer_title

_WEIGHT, _GRADIENT, _OUTPUT, _COUNT = range(4)


class LayerNorms:
    """Collects the norms.

    Args:
        chunks: this rank's model chunks in megatron's DDP wrapper.
        interval: steps between records; None for none.
    """

    def __init__(self, chunks: Sequence[Any], interval: int | None) -> None:
        self._chunks, self._interval = chunks, interval
        self._symbols = bare(chunks[0]).layer_symbols
        self._squares = torch.zeros(0)

    def wanted(self, step: int) -> bool:
        """Whether the record of ``step`` is asked for."""
        return self._interval is not None and step % self._interval == 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Inside, the layers' outputs are measured, where the step is a wanted one."""
        if not self.wanted(step):
            yield
            return
        rows = len(self._symbols) + 2
        self._squares = torch.zeros(rows, 4, dtype=torch.float64, device=distributed.device())
        hooks = [
            module.register_forward_hook(self._hook(layer_place(bare(chunk), name)[0]))
            for chunk in self._chunks
            for name, module in bare(chunk).named_modules()
            if name == "embedding" or _is_layer(name)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, row: int) -> Any:
        config = get_model_config(self._chunks[0])
        has_first_pass = config.sequence_pieces > 1 and config.sequence_piece_gradients == "exact"

        def measure(module: Any, inputs: Any, output: Any) -> None:
            if has_first_pass and not torch.is_grad_enabled():
                return  # its outputs come again
            tensor = (output[0] if isinstance(output, tuple) else output).detach()
            norm = torch.linalg.vector_norm(tensor, dtype=torch.float32).double()
            self._squares[row, _OUTPUT] += norm**2
            self._squares[row, _COUNT] += tensor.numel()

        return measure

    def collect(self) -> dict[str, list[Any]]:
        """The record, when the gradients are reduced and the weights not yet changed.

        Every rank calls it. ``names``, and by row ``weight_norm``, ``gradient_norm`` and
        ``activation_rms`` (root mean square of the output's numbers; None where it is not taken).
        """
        for chunk in self._chunks:
            for name, parameter in bare(chunk).named_parameters():
                row = layer_place(bare(chunk), name)[0]
                if _counts_here(parameter):
                    self._add_parameter(chunk, parameter, row)
        torch.distributed.all_reduce(self._squares)
        table = self._squares.tolist()
        return {
            "names": [layer_title(row, self._symbols) for row in range(len(table))],
            "weight_norm": [round(row[_WEIGHT] ** 0.5, 6) for row in table],
            "gradient_norm": [float(f"{row[_GRADIENT] ** 0.5:.6g}") for row in table],
            "activation_rms": [
                float(f"{(row[_OUTPUT] / row[_COUNT]) ** 0.5:.6g}") if row[_COUNT] else None
                for row in table
            ],
        }

    def _add_parameter(self, chunk: Any, parameter: Any, row: int) -> None:
        buffer = next(each for each in chunk.buffers if parameter in each.param_index_map)
        group = buffer.data_parallel_group
        rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        if rank == 0:
            self._squares[row, _WEIGHT] += _square(plain(parameter.detach()))
        start, end, bucket_id = buffer.param_index_map[parameter]
        bucket = buffer.buckets[bucket_id]
        part = bucket.grad_data.numel() // ranks
        first = bucket.offset + rank * part
        begin, stop = max(start, first), min(end, first + part)
        if begin < stop:
            own = bucket.grad_data[begin - bucket.offset : stop - bucket.offset]
            self._squares[row, _GRADIENT] += _square(own)


def _is_layer(name: str) -> bool:
    return name.startswith("decoder.layers.") and name.count(".") == 2


def _square(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).double() ** 2


def _counts_here(parameter: Any) -> bool:
    """As in megatron's gradient norm: a tied matrix's second copy, and what tensor-parallel ranks
    hold alike, count once."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    if getattr(parameter, "shared", False):
        return False
    group = parallel_state.get_tensor_model_parallel_group()
    return bool(param_is_not_tensor_parallel_duplicate(parameter, tp_group=group))
