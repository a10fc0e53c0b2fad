"""The causal convolution and the selective scan, with given and returned states; rotary embedding.

Over a whole prompt mamba-ssm's and causal-conv1d's kernels where they are installed, else torch. Of
a single token that goes on from a state, kernels of this file where there is Triton (it comes with
torch for NVIDIA GPUs), else torch.
"""

import subprocess
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


COUNTED = 1 << 32
"""The packages' kernels compute in 32 bits where a number lies, and of more would take others."""


def _countable(x: Tensor) -> bool:
    """Whether they reach all numbers of ``x`` from the first."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return last < COUNTED


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU.

    Args:
        x: [b, C, L].
        weight: [C, 1, taps].
        bias: [C] or None.
        before: the inputs before x, [b, C, taps - 1]; zeros when None. A single token's kernel
            writes the new ones into it.

    Returns:
        [b, C, L], and the last inputs [b, C, taps - 1] for the next call.
    """
    past = weight.shape[-1] - 1
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if step_kernels is not None and before is not None and _is_next_token(x):
        before = before.to(x.dtype)
        y = _convolve_token(_rows(x.squeeze(-1)), weight.contiguous(), bias, before)
        if y is not None:
            return y.unsqueeze(-1), before
    packaged = causal_conv1d_fn is not None and x.is_cuda and x.numel() < COUNTED
    if packaged and before is None and x.shape[-1] > past:
        y = causal_conv1d_fn(x.contiguous(), weight.squeeze(1), bias, activation="silu")
        return y, x[..., -past:].clone()
    if before is None:
        before = x.new_zeros(*x.shape[:2], past)
    whole = torch.cat([before.to(x.dtype), x], dim=-1)
    # Cloned: a view would keep the whole prompt's inputs in memory.
    last = whole[..., whole.shape[-1] - past :].clone()
    if packaged and x.shape[-1] > 1 and _countable(whole):
        y = causal_conv1d_fn(whole, weight.squeeze(1), bias, activation="silu")
        # A copy: mamba-ssm's kernel reads sixteen bytes at a time, from where its input begins.
        return y[..., past:].contiguous(), last
    return F.silu(F.conv1d(whole, weight, bias, groups=x.shape[1])), last


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = (C_t · h_t + D u_t) silu(z_t) in fp32.

    Args:
        u: [b, E, L]; delta, z likewise; B, C: [b, N, L]; A: [E, N]; D, delta_bias: [E].
        state: h before the first token [b, E, N]; zeros when None. A single token's kernel writes
            the new one into it.

    Returns:
        y [b, E, L] in u's dtype, and h after the last token.
    """
    if step_kernels is not None and state is not None and _is_next_token(u):
        token = [_rows(part.squeeze(-1)) for part in (u, delta, B, C, z)]
        state = state.contiguous()
        y = _scan_token(token, A.contiguous(), D.contiguous(), delta_bias.contiguous(), state)
        if y is not None:
            return y.unsqueeze(-1), state
    countable = all(map(_countable, (u, delta, z)))
    if not countable and u.shape[0] > 1:
        before = [None] * u.shape[0] if state is None else state.split(1)
        sequences = zip(*(part.split(1) for part in (u, delta, B, C, z)), before, strict=True)
        found = [
            selective_scan(u, dt, A, b, c, D, z, delta_bias, h) for u, dt, b, c, z, h in sequences
        ]
        outputs, states = zip(*found, strict=True)
        return torch.cat(outputs), torch.cat(states)
    packaged = selective_scan_fn is not None and u.is_cuda and countable
    if packaged and (state is None or u.shape[-1] > 1):
        y, last = selective_scan_fn(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True
        )
        if state is None:
            return y, last.clone()
        more, left = _carried(state, delta, A, C, delta_bias)
        return y + (more * F.silu(z.float())).to(y.dtype), last + left
    return _scan_in_torch(u, delta, A, B, C, D, z, delta_bias, state)


_CARRIED = 128
"""Tokens to which a state is carried at a time: each has a state's memory meanwhile."""


def _carried(
    state: Tensor, delta: Tensor, A: Tensor, C: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """What a state before the first token adds to those of a scan that began without.

    The recurrence is linear in h: the state decays beside what the tokens bring, and mamba-ssm's
    kernel, which takes no state, need not know of it.

    Returns:
        [b, E, L] to add to y before its gate, and what is left of the state [b, E, N]; in fp32.
    """
    parts = []
    for start in range(0, delta.shape[-1], _CARRIED):
        tokens = slice(start, start + _CARRIED)
        steps = F.softplus(delta[:, :, tokens].float() + delta_bias[:, None]).cumsum(-1)
        states = torch.exp(steps[..., None] * A[:, None]) * state[:, :, None]
        parts.append((states * C[:, None, :, tokens].transpose(2, 3)).sum(-1))
        state = states[:, :, -1]
    return torch.cat(parts, dim=-1), state.contiguous()


def _is_next_token(x: Tensor) -> bool:
    """Whether the kernels of a single token, which know no gradient, may be used."""
    return x.is_cuda and x.shape[-1] == 1 and not torch.is_grad_enabled()


def _rows(x: Tensor) -> Tensor:
    """The tensor [b, x], or a copy if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _make_convolution_step() -> Any:
    """A token's convolution of a block of channels of a sequence; its state changes in place, and
    everything is fp32 between load and store."""

    @triton.jit
    def convolution_step(  # type: ignore[no-untyped-def]
        x,
        weight,
        bias,
        before,
        y,
        x_row,
        before_row,
        before_channel,
        before_tap,
        channels,
        TAPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sequence = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = channel < channels
        new = tl.load(x + sequence * x_row + channel, inside, other=0.0)
        weight += channel * TAPS
        factor = tl.load(weight + TAPS - 1, inside, other=0.0)
        total = new.to(tl.float32) * factor.to(tl.float32)
        if bias is not None:
            total += tl.load(bias + channel, inside, other=0.0).to(tl.float32)
        before += sequence * before_row + channel * before_channel
        for tap in tl.static_range(TAPS - 1):
            old = tl.load(before + tap * before_tap, inside, other=0.0)
            factor = tl.load(weight + tap, inside, other=0.0)
            total += old.to(tl.float32) * factor.to(tl.float32)
            if tap > 0:
                tl.store(before + (tap - 1) * before_tap, old, inside)
        if TAPS > 1:
            tl.store(before + (TAPS - 2) * before_tap, new, inside)
        result = total * tl.sigmoid(total)
        tl.store(y + sequence * channels + channel, result.to(y.dtype.element_ty), inside)

    return convolution_step


def _make_scan_step() -> Any:
    """A token's scan, likewise."""

    @triton.jit
    def scan_step(  # type: ignore[no-untyped-def]
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        state,
        y,
        u_row,
        delta_row,
        B_row,
        C_row,
        z_row,
        channels,
        states,
        STATES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        sequence = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        number = tl.arange(0, STATES)
        inside, known = channel < channels, number < states
        both = inside[:, None] & known[None, :]
        place = channel[:, None] * states + number[None, :]

        raw = tl.load(delta + sequence * delta_row + channel, inside, other=0.0).to(tl.float32)
        raw += tl.load(delta_bias + channel, inside, other=0.0)
        # log(1 + e) with all its digits where e is small.
        e = tl.exp(tl.minimum(raw, 20.0))
        rounded = 1.0 + e
        kept = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
        step = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / kept))
        step = tl.where(raw > 20.0, raw, step)

        wide = tl.load(u + sequence * u_row + channel, inside, other=0.0).to(tl.float32)
        b = tl.load(B + sequence * B_row + number, known, other=0.0).to(tl.float32)
        c = tl.load(C + sequence * C_row + number, known, other=0.0).to(tl.float32)
        decay = tl.exp(step[:, None] * tl.load(A + place, both, other=0.0))
        state += sequence * channels * states + place
        h = decay * tl.load(state, both, other=0.0) + (step * wide)[:, None] * b[None, :]
        tl.store(state, h, both)

        result = tl.sum(h * c[None, :], 1) + tl.load(D + channel, inside, other=0.0) * wide
        gate = tl.load(z + sequence * z_row + channel, inside, other=0.0).to(tl.float32)
        result *= gate * tl.sigmoid(gate)
        tl.store(y + sequence * channels + channel, result.to(y.dtype.element_ty), inside)

    return scan_step


step_kernels = None if triton is None else (_make_convolution_step(), _make_scan_step())
"""Set to None, single tokens are computed by torch as well."""
_NUMBERS = 512
"""That a program works on: 16 bytes of states a thread."""


def _launch(number: int, grid: tuple[int, ...], *arguments: Any) -> bool:
    """Runs a step kernel on its first argument's device; False where it cannot be compiled: Triton
    needs a C compiler, and without one torch computes tokens from then on."""
    global step_kernels
    assert step_kernels is not None
    try:
        with torch.cuda.device_of(arguments[0]):
            step_kernels[number][grid](*arguments)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        warnings.warn(f"single tokens are computed by torch: {error}", stacklevel=2)
        step_kernels = None
        return False
    return True


def _convolve_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor
) -> Tensor | None:
    """[b, C] → [b, C]; weight [C, 1, taps]; ``before`` [b, C, taps - 1] moves on by a token."""
    batch, channels = x.shape
    y = x.new_empty(batch, channels)
    grid = (batch, triton.cdiv(channels, _NUMBERS))
    strides, sizes = (x.stride(0), *before.stride()), (channels, weight.shape[-1], _NUMBERS)
    ran = _launch(0, grid, x, weight, bias, before, y, *strides, *sizes)
    return y if ran else None


def _scan_token(
    token: list[Tensor], A: Tensor, D: Tensor, delta_bias: Tensor, state: Tensor
) -> Tensor | None:
    """u, delta, B, C, z, of which B and C are [b, N] and the others [b, E] → [b, E]; ``state``
    [b, E, N] moves on by a token."""
    u, delta, B, C, z = token
    (batch, channels), states = u.shape, A.shape[1]
    y = u.new_empty(batch, channels)
    padded = triton.next_power_of_2(states)
    block = max(1, _NUMBERS // padded)
    rows = [part.stride(0) for part in (u, delta, B, C, z)]
    tensors, sizes = (u, delta, A, B, C, D, z, delta_bias, state, y), (channels, states)
    grid = (batch, triton.cdiv(channels, block))
    ran = _launch(1, grid, *tensors, *rows, *sizes, padded, block)
    return y if ran else None


def _scan_in_torch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    wide = u.float()
    step = F.softplus(delta.float() + delta_bias[:, None])
    source = step * wide
    B, C = B.float(), C.float()
    if state is None:
        state = wide.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(u.shape[-1]):
        decay = torch.exp(step[:, :, t, None] * A)
        state = decay * state + source[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = (torch.stack(outputs, dim=-1) + D[:, None] * wide) * F.silu(z.float())
    return y.to(u.dtype), state


def rotate(q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Rotary embedding of [b, heads, L, head dim]; halves, not neighbours, make a pair."""
    if rotary is None:
        return q, k
    cos, sin = (part[:, None] for part in rotary)
    # Together: while single tokens are written, time goes by the number of kernels.
    low, high = torch.cat([q, k], dim=1).float().chunk(2, dim=-1)
    turned = (
        torch.addcmul(low * cos, high, sin, value=-1.0),
        torch.addcmul(high * cos, low, sin),
    )
    heads = [q.shape[1], k.shape[1]]
    q, k = torch.cat(turned, dim=-1).to(q.dtype).split(heads, dim=1)
    return q, k
