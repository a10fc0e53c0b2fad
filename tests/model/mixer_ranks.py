"""Compares the tensor-parallel Mamba mixer with a slow, obvious fp64 Mamba.

Every rank builds the reference from the whole weights, gives its slices to the mixer, and compares
output and gradients with its part of the reference's. Prints one JSON line a case: the worst
relative error over ranks, by tensor.
"""

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from samba_megatron.config import ModelConfig, ParallelConfig, RunConfig
from samba_megatron.platform import distributed

S, B, D, EXPAND, N, R, WIDTH = 12, 2, 16, 2, 4, 3, 4
E = EXPAND * D
CASES = [(1, False), (2, False), (2, True), (4, False), (4, True)]


def whole_weights() -> dict[str, Tensor]:
    """All parameters, drawn the same on every rank."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    return {
        "in_proj.weight": draw(2 * E, D),
        "conv1d.weight": draw(E, 1, WIDTH),
        "conv1d.bias": draw(E),
        "x_proj.weight": draw(R + 2 * N, E),
        "dt_proj.weight": draw(E, R),
        "dt_proj.bias": draw(E),
        "A_log": draw(E, N),
        "D": draw(E),
        "out_proj.weight": draw(D, E),
    }


def reference(h: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Mamba (arXiv 2312.00752, algorithm 2) step by step: [s, b, d] → [s, b, d]."""
    x, z = (h @ w["in_proj.weight"].T).split(E, dim=-1)
    padded = torch.cat([x.new_zeros(WIDTH - 1, B, E), x])
    taps = w["conv1d.weight"][:, 0]
    x = F.silu(sum(padded[k : k + S] * taps[:, k] for k in range(WIDTH)) + w["conv1d.bias"])
    dt, b, c = (x @ w["x_proj.weight"].T).split([R, N, N], dim=-1)
    dt = F.softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    a = -torch.exp(w["A_log"])
    state, outputs = x.new_zeros(B, E, N), []
    for t in range(S):
        decay = torch.exp(dt[t, :, :, None] * a)
        state = decay * state + (dt[t] * x[t])[:, :, None] * b[t, :, None, :]
        outputs.append((state * c[t, :, None, :]).sum(-1) + w["D"] * x[t])
    return (torch.stack(outputs) * F.silu(z)) @ w["out_proj.weight"].T


def own_slice(name: str, whole: Tensor, tp: int, rank: int) -> Tensor:
    """A rank's part of a whole parameter, by the table of Mamba's tensor-parallel split."""
    if name == "in_proj.weight":  # the x and z halves each on their own
        x, z = whole.split(E)
        return torch.cat([x.chunk(tp)[rank], z.chunk(tp)[rank]])
    return whole.chunk(tp, dim=1 if name in ("x_proj.weight", "out_proj.weight") else 0)[rank]


def compare(tp: int, sequence_parallel: bool) -> dict[str, float]:
    """Largest relative errors of this rank for one layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from samba_megatron.model.layers.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from samba_megatron.model.transformer_config import build_transformer_config

    run = RunConfig(
        model=ModelConfig(
            "M", hidden_size=D, num_attention_heads=4, d_state=N, dt_rank=R, d_conv=WIDTH
        ),
        parallel=ParallelConfig(tp, sequence_parallel),
    )
    config = build_transformer_config(run, "local")
    config.params_dtype = torch.float64
    mixer = MambaMixer(
        config,
        MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
        d_model=D,
        layer_number=1,
        pg_collection=distributed.process_groups(),
    ).double()
    rank = parallel_state.get_tensor_model_parallel_rank()
    weights = {name: w.requires_grad_() for name, w in whole_weights().items()}
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(own_slice(name, weights[name], tp, rank))
    generator = torch.Generator().manual_seed(11)
    h = torch.randn(S, B, D, generator=generator, dtype=torch.float64).requires_grad_()
    direction = torch.randn(S, B, D, generator=generator, dtype=torch.float64)
    expected = reference(h, weights)
    (expected * direction).sum().backward()

    part = slice(None) if not sequence_parallel else slice(rank * S // tp, (rank + 1) * S // tp)
    own = h.detach()[part].clone().requires_grad_()
    output, _ = mixer(own)
    (output * direction[part]).sum().backward()
    errors = {
        "output": error(output, expected[part]),
        "input": error(gradient(own), gradient(h)[part]),
    }
    for name, parameter in mixer.named_parameters():
        errors[name] = error(
            gradient(parameter), own_slice(name, gradient(weights[name]), tp, rank)
        )
    return errors


def gradient(tensor: Tensor) -> Tensor:
    """Its gradient, which must be there."""
    assert tensor.grad is not None
    return tensor.grad


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def main() -> None:
    """All layouts in one world."""
    for tp, sequence_parallel in CASES:
        distributed.initialize(ParallelConfig(tp, sequence_parallel))
        gathered: list[dict[str, float]] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, compare(tp, sequence_parallel))
        if torch.distributed.get_rank() == 0:
            worst = {name: max(errors[name] for errors in gathered) for name in gathered[0]}
            print(json.dumps({"tp": tp, "sp": sequence_parallel, "errors": worst}), flush=True)
        distributed.leave_layout()
    distributed.shutdown()


if __name__ == "__main__":
    main()
