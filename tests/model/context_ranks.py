"""A model whose sequences several ranks share, against the same model on one.

Everything is fp64: logits and every parameter's gradient, as the data-parallel wrapper reduces them
and divides them by the tokens that count, of which the ranks have unequally many. Prints one JSON
line a case: the largest relative error over ranks, by tensor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.utils import get_model_config
from torch import Tensor

from samba_megatron.config import ParallelConfig
from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from samba_megatron.model.samba import build_model
from samba_megatron.model.sequence import documents_apart
from samba_megatron.platform import distributed
from samba_megatron.training.schedule import own_piece
from tests.model.isolation import LENGTH, SEQUENCES, TORCH, VOCABULARY, Packing, packings, toy_run

SELECTIVE: dict[str, Any] = {
    "recompute_granularity": "selective",
    "recompute_modules": ["mamba", "attention", "mlp"],
}
PARTS: dict[str, Any] = {
    "recompute_granularity": "selective",
    "recompute_modules": list(RECOMPUTABLE_PARTS),
}
CASES: dict[str, tuple[int, ParallelConfig]] = {
    "cp2, window in a piece": (24, ParallelConfig(context_parallel_size=2, **PARTS)),
    "cp4, window over pieces": (100, ParallelConfig(context_parallel_size=4, **SELECTIVE)),
    "cp4, window of a piece and one": (
        LENGTH // 4 + 1,
        ParallelConfig(context_parallel_size=4, recompute_granularity="full"),
    ),
}
"""The window, and the layout of four processes; what CP leaves of them is data-parallel."""
PACKINGS = 2


@dataclass
class Result:
    """Of one packing."""

    logits: Tensor
    """[b, s, V]: of this rank's positions."""
    gradients: dict[str, Tensor] = field(default_factory=dict)


def drawn() -> list[Packing | None]:
    """The same on every rank; None for sequences that are one document."""
    found: list[Packing | None] = [None]

    @settings(
        max_examples=PACKINGS,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(packings())
    def keep(packing: Packing) -> None:
        found.append(packing)

    keep()
    return found


def run(window: int, parallel: ParallelConfig, cases: Sequence[Packing | None]) -> list[Result]:
    """Every packing through a model in the layout that is up."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunk: Any = build_model(toy_run(TORCH, parallel, window_size=window), "local")[0].double()
    # megatron computes the angles of the rotary embedding in its frequencies' dtype.
    chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb.inv_freq.double()
    get_model_config(chunk).params_dtype = torch.float64
    wrapped = DistributedDataParallel(
        get_model_config(chunk),
        DistributedDataParallelConfig(use_distributed_optimizer=False),
        chunk,
    )
    return [one(wrapped, packing) for packing in cases]


def one(model: DistributedDataParallel, packing: Packing | None) -> Result:
    """Logits, and gradients of a random form of those positions that count, per such position."""
    model.zero_grad_buffer()
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    form = torch.randn(SEQUENCES, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    mask = (torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.4).double()
    mask[:, LENGTH // 4 : LENGTH // 2] = 0.0  # of four pieces, one counts nothing
    batch = own_piece().cut({"tokens": tokens, "loss_mask": mask, "labels": form})
    own_tokens, own_mask, own_form = (batch[n] for n in ("tokens", "loss_mask", "labels"))
    assert own_tokens is not None and own_mask is not None and own_form is not None
    start = None if packing is None else packing.document_start()[:SEQUENCES]
    sequence = None if start is None else documents_apart(start, "cpu")
    logits = model(own_tokens, None, None, packed_seq_params=sequence)
    (logits * own_form * own_mask.unsqueeze(-1)).sum().backward()
    finalize_model_grads([model], num_tokens=own_mask.sum().to(torch.int))
    gradients = {name: p.main_grad.clone() for name, p in model.module.named_parameters()}
    return Result(logits.detach(), gradients)


def compare(actual: Result, expected: Result) -> dict[str, float]:
    """Relative errors of this rank; ``expected`` has all positions."""
    part = own_piece()
    first = part.number * LENGTH // part.of
    wanted = expected.logits[:, first : first + LENGTH // part.of]
    errors = {"logits": _error(actual.logits, wanted)}
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        errors[name] = _error(actual.gradients[name], gradient)
    return errors


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def main() -> None:
    """All cases in one world."""
    for name, (window, parallel) in CASES.items():
        cases = drawn()
        distributed.initialize(ParallelConfig())
        whole = run(window, ParallelConfig(), cases)
        distributed.leave_layout()
        distributed.initialize(parallel)
        assert parallel_state.get_context_parallel_world_size() == parallel.context_parallel_size
        results = run(window, parallel, cases)
        errors: dict[str, float] = {}
        for actual, expected in zip(results, whole, strict=True):
            for what, error in compare(actual, expected).items():
                errors[what] = max(errors.get(what, 0.0), error)
        gathered: list[dict[str, float]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, errors)
        if torch.distributed.get_rank() == 0:
            worst = {what: max(found[what] for found in gathered) for what in errors}
            print(json.dumps({"case": name, "packings": len(cases), "errors": worst}), flush=True)
        distributed.leave_layout()
    distributed.shutdown()


if __name__ == "__main__":
    main()
