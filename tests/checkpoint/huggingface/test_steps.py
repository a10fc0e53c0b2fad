"""A token's step of the shipped code by its own kernels: on a GPU, and interpreted on a CPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samba_megatron.checkpoint.huggingface.shipped import operations_samba
from samba_megatron.ops.causal_conv1d import causal_conv1d_reference
from samba_megatron.ops.selective_scan import selective_scan_reference
from tests.checkpoint.huggingface.test_modeling import build, tokens
from tests.ops.comparing import Inputs, assert_near, to
from tests.ops.interpreting import interpret


def compare_scan(
    batch: int, channels: int, states: int, seed: int, device: str, dtype: torch.dtype
) -> None:
    """Three tokens, one after the other, are the scan that trains over three positions in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    # As the mixer has them: z is half of a tensor, B and C are parts of one.
    wide = normal(3, batch, 3 * channels).to(dtype)
    u, delta, z = wide.chunk(3, -1)
    _, B, C = normal(3, batch, 5 + 2 * states).to(dtype).split([5, states, states], -1)
    delta = delta * 4 - 3
    A, D, bias = -torch.exp(normal(channels, states)), normal(channels), normal(channels) - 2
    state = normal(batch, channels, states)
    start = state.clone()
    found = []
    for t in range(3):
        u_t, delta_t, B_t, C_t, z_t = (part[t].unsqueeze(-1) for part in (u, delta, B, C, z))
        y, after = operations_samba.selective_scan(u_t, delta_t, A, B_t, C_t, D, z_t, bias, state)
        assert after is state  # changed in place: a captured CUDA graph finds it again
        found.append(y.squeeze(-1))
    inputs: Inputs = {
        "u": u,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "z": z,
        "delta_bias": bias,
    }
    inputs["initial_state"] = start
    y, expected_state = selective_scan_reference(**to(inputs, torch.float64))
    rounding = torch.finfo(dtype).eps
    assert_near({"y": torch.stack(found)}, {"y": y}, max(rounding, 2e-6), least_scale=1.0)
    assert_near({"state": state}, {"state": expected_state}, 2e-6, least_scale=1.0)


def compare_convolution(
    batch: int, channels: int, taps: int, seed: int, device: str, dtype: torch.dtype
) -> None:
    """The same of the convolution; inputs before lie in either order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x = normal(3, batch, 2 * channels)[..., :channels]
    weight, bias = normal(channels, 1, taps), normal(channels) if seed % 2 else None
    before = normal(batch, channels, taps - 1)
    if seed % 3 == 0:
        before = before.transpose(1, 2).contiguous().transpose(1, 2)
    start, found, state = before.clone(), [], before
    for t in range(3):
        y, after = operations_samba.causal_convolution(x[t].unsqueeze(-1), weight, bias, state)
        assert after is state
        found.append(y.squeeze(-1))
    expected = causal_conv1d_reference(
        x.double(),
        weight.squeeze(1).double(),
        None if bias is None else bias.double(),
        start.permute(2, 0, 1).double(),
    )
    rounding = torch.finfo(dtype).eps
    assert_near({"y": torch.stack(found)}, {"y": expected}, max(rounding, 1e-6), least_scale=1.0)
    whole = torch.cat([start, x.permute(1, 2, 0)], -1)
    assert torch.equal(state, whole[..., whole.shape[-1] - taps + 1 :])


def compare_generation(name: str) -> None:
    """Greedy texts and logits of single tokens, with the kernels and without."""
    model, ids, found = build(name), tokens(2, 6), []
    kernels = operations_samba.step_kernels
    for step_kernels in (kernels, None):
        operations_samba.step_kernels = step_kernels
        written = model.generate(ids, max_new_tokens=6, min_new_tokens=6)
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            logits = model(written[:, 6:7], past_key_values=cache).logits
        found.append((written, logits))
    operations_samba.step_kernels = kernels
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=2e-5)


def compare() -> None:
    """In Triton's interpreter, which runs kernels on CPU tensors."""
    calls = []
    scan, convolve = operations_samba._scan_token, operations_samba._convolve_token
    operations_samba._is_next_token = lambda x: x.shape[-1] == 1  # not only on a GPU

    def counted(function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            calls.append(function)
            return function(*arguments)

        return run

    operations_samba._scan_token = counted(scan)
    operations_samba._convolve_token = counted(convolve)
    sizes = {"batch": st.integers(1, 3), "channels": st.integers(1, 70), "seed": st.integers(0, 99)}

    @settings(max_examples=6, deadline=None, database=None)
    @given(states=st.integers(1, 64), **sizes)
    def scans(**of: int) -> None:
        compare_scan(**of, device="cpu", dtype=torch.float32)

    @settings(max_examples=6, deadline=None, database=None)
    @given(taps=st.integers(2, 5), **sizes)
    def convolutions(**of: int) -> None:
        compare_convolution(**of, device="cpu", dtype=torch.float32)

    scans()
    convolutions()
    for states in (8, 16, 64):
        compare_scan(1, 70, states, 0, "cpu", torch.float32)
    calls.clear()
    compare_generation("Mamba-SWA-MLP")  # which convolves queries, keys and values too
    assert set(calls) == {scan, convolve}


def test_steps_are_the_operations_that_train() -> None:
    interpret("tests.checkpoint.huggingface.test_steps")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_on_a_gpu(dtype: torch.dtype) -> None:
    assert operations_samba.step_kernels is not None, "torch for NVIDIA GPUs comes with Triton"
    with torch.no_grad():
        for batch, channels, states in ((1, 4608, 16), (16, 3072, 16), (3, 77, 8), (2, 130, 63)):
            compare_scan(batch, channels, states, channels, "cuda", dtype)
        for batch, channels, taps in ((1, 4608, 4), (16, 3072, 4), (3, 77, 2), (2, 130, 5)):
            compare_convolution(batch, channels, taps, channels, "cuda", dtype)


@pytest.mark.gpu
def test_a_captured_token_on_a_gpu() -> None:
    """One token after another by one CUDA graph of a Mamba layer, as without the kernels."""
    mixer = build().backbone.layers[0].mixer.cuda().eval()
    states = [torch.randn(3, mixer.A_log.shape[0], n, device="cuda") for n in (3, mixer.n)]
    tokens_in = torch.randn(5, 3, 1, mixer.in_proj.in_features, device="cuda")
    kernels, found = operations_samba.step_kernels, []
    exact = torch.backends.cudnn.flags(allow_tf32=False)
    with torch.no_grad(), exact, pytest.MonkeyPatch.context() as patch:
        patch.setattr(operations_samba, "step_kernels", None)
        expected, plain = [], _state(states)
        for token in tokens_in:
            expected.append(mixer(token, None, None, plain))
        patch.setattr(operations_samba, "step_kernels", kernels)
        mixer(tokens_in[0], None, None, _state(states))  # compiles
        held, given = _state(states), tokens_in[0].clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = mixer(given, None, None, held)
        for token in tokens_in:
            given.copy_(token)
            graph.replay()
            found.append(output.clone())
    assert_near({"": torch.stack(found)}, {"": torch.stack(expected)}, 1e-4)


def _state(tensors: list[Tensor]) -> Any:
    from samba_megatron.checkpoint.huggingface.shipped.cache_samba import MambaState

    state = MambaState()
    state.conv, state.scan = (tensor.clone() for tensor in tensors)
    return state
