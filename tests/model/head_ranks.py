"""Compares the chunked head with head and loss written out in fp64.

Rank 0 draws the cases (hypothesis shrinks a failing one) and tells the others. Every rank builds
the head of its part of the vocabulary, gives it its part of the hidden states, and compares sum,
losses and gradients with its parts of the whole's. Prints one JSON line a layout.
"""

import json
from functools import partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samba_megatron.config import KernelsConfig, ModelConfig, ParallelConfig, RunConfig
from samba_megatron.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from samba_megatron.platform import distributed

LAYOUTS = [(1, False), (2, False), (2, True)]
"""Tensor-parallel ranks, and whether tokens are divided between the layers."""
TOLERANCE = 1e-12
EXAMPLES = 15
WIDTH = 8
Case = dict[str, Any]


@st.composite
def cases(draw: Any) -> Case:
    """Sizes, chunks from one token to all, masks, ignored tokens; the embedding's weight or not."""
    return {
        "length": 2 * draw(st.integers(1, 5)),
        "batch": draw(st.integers(1, 3)),
        "vocabulary": 2 * draw(st.integers(1, 12)),
        "chunk": draw(st.integers(1, 12)),
        "tied": draw(st.booleans()),
        "buffer": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**30)),
    }


def build_head(case: Case, layout: tuple[int, bool], weight: Tensor) -> Any:
    """The head as the model has it, with this rank's rows of the weight."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from samba_megatron.model import head
    from samba_megatron.model.transformer_config import build_transformer_config

    run = RunConfig(
        model=ModelConfig("M", hidden_size=WIDTH, num_attention_heads=4),
        parallel=ParallelConfig(*layout),
        kernels=KernelsConfig(cross_entropy="chunked"),
    )
    config = build_transformer_config(run, "local")
    config.params_dtype = torch.float64
    plain = ColumnParallelLinear(
        WIDTH,
        case["vocabulary"],
        config=config,
        init_method=config.init_method,
        bias=False,
        skip_weight_param_allocation=case["tied"],
        tp_group=distributed.process_groups().tp,
    )
    if not case["tied"]:
        plain.weight = torch.nn.Parameter(weight)
    head.linear_cross_entropy = partial(linear_cross_entropy, chunk=case["chunk"])
    return head.ChunkedHead(plain, config)


def draw_tensors(case: Case) -> dict[str, Tensor]:
    """The whole's, the same on every rank."""
    generator = torch.Generator().manual_seed(case["seed"])
    tokens = (case["batch"], case["length"])
    labels = torch.randint(0, case["vocabulary"], tokens, generator=generator)
    chance = torch.rand(2, *tokens, generator=generator)
    hidden = torch.randn(*tokens[::-1], WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(case["vocabulary"], WIDTH, generator=generator, dtype=torch.float64)
    return {
        "hidden": hidden,
        "weight": weight,
        "labels": labels.masked_fill(chance[0] < 0.2, -1),
        "mask": (chance[1] > 0.3).double(),
    }


def compare(case: Case, layout: tuple[int, bool]) -> dict[str, float]:
    """Largest errors over the ranks."""
    tensors, tensor_parallel = draw_tensors(case), layout[0]
    rank = torch.distributed.get_rank() % tensor_parallel
    hidden, weight = (tensors[name].clone().requires_grad_() for name in ("hidden", "weight"))
    total, losses = linear_cross_entropy_reference(
        hidden.view(-1, WIDTH),
        weight,
        *(tensors[name].t().flatten() for name in ("labels", "mask")),
    )
    (3 * total).backward()

    rows = tensors["weight"].chunk(tensor_parallel)[rank].clone()
    head = build_head(case, layout, rows)
    own_weight: Any = torch.nn.Parameter(rows) if case["tied"] else head.weight
    if case["buffer"]:
        own_weight.main_grad = torch.zeros_like(own_weight)
        head.fuse_wgrad_accumulation = True
    half = case["length"] // 2
    part = slice(rank * half, (rank + 1) * half) if layout[1] else slice(None)
    own = tensors["hidden"][part].clone().requires_grad_()
    result = head(
        own,
        own_weight if case["tied"] else None,
        labels=tensors["labels"],
        loss_mask=tensors["mask"],
    )
    (3 * result.total).backward()
    gradient = own_weight.main_grad if case["buffer"] else own_weight.grad
    assert hidden.grad is not None and weight.grad is not None and own.grad is not None
    return worst(
        {
            "total": (result.total - total).abs(),
            "losses": result.each - losses.view(case["length"], -1).t(),
            "hidden": own.grad - hidden.grad[part],
            "weight": gradient - weight.grad.chunk(tensor_parallel)[rank],
        }
    )


def worst(errors: dict[str, Tensor]) -> dict[str, float]:
    """Over all ranks; all values here are about 1."""
    values = torch.stack([error.detach().abs().max() for error in errors.values()])
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(errors, values.tolist(), strict=True))


def told(case: Case | None) -> Case | None:
    """Rank 0's case, on every rank."""
    box = [case]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def run_layout(layout: tuple[int, bool]) -> int:
    """All cases of one layout; how many."""
    seen = [0]

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(case=cases())
    def check(case: Case) -> None:
        told(case)
        seen[0] += 1
        errors = compare(case, layout)
        assert max(errors.values()) < TOLERANCE, errors

    if torch.distributed.get_rank() == 0:
        try:
            check()
        finally:
            told(None)
        return seen[0]
    while (case := told(None)) is not None:
        compare(case, layout)
    return 0


def main() -> None:
    """All layouts in one world of two ranks."""
    for layout in LAYOUTS:
        distributed.initialize(ParallelConfig(*layout))
        cases_seen = run_layout(layout)
        if torch.distributed.get_rank() == 0:
            print(json.dumps({"layout": layout, "cases": cases_seen}), flush=True)
        distributed.leave_layout()
    distributed.shutdown()


if __name__ == "__main__":
    main()
