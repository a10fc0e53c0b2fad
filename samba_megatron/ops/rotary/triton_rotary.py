"""Backend "triton": the split and the rotation, one pass over memory forward and one backward.

A row of the joined projection, one token's, holds for each group its queries, its key and its
value: slots of a head's width. A program reads the slots of one row and writes each to where
attention wants it; backward it reads the three gradients, in whatever order they lie, and writes
the joined one. Everything is fp32 between the load and the store, the angles' sines and cosines
too, which are computed where they are used: nothing but the angles is kept for the backward.

Triton's sine and cosine are libdevice's, which reduce an angle of any size before they look at it,
and not the GPU's approximate ones: a position of a million is as good as the first.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.cost import Passes, rotary_work
from samba_megatron.ops.operators import define, differentiate
from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend

BLOCK = 1024
"""Pairs that a program holds at once, 16 a thread; it goes over a row in blocks of so many, and
computes the row's sines and cosines once."""
_PAIRS_A_THREAD = 16


@cache
def make_kernels() -> tuple[Any, Any]:
    """The forward and the backward kernel.

    They are made when they are first needed, because a machine without a GPU may lack Triton.
    """
    return _forward_kernel(), _backward_kernel()


def _forward_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def rotary_forward(  # type: ignore[no-untyped-def]
        qkv,
        angles,
        q,
        k,
        v,
        batch,
        QUERIES: tl.constexpr,
        GROUPS: tl.constexpr,
        PAIRS: tl.constexpr,
        SLOT_BLOCK: tl.constexpr,
        PAIR_BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        pair = tl.arange(0, PAIR_BLOCK)
        angle = tl.load(angles + row // batch * 2 * PAIRS + pair, pair < PAIRS, other=0.0)
        cos, sin = tl.cos(angle.to(tl.float32))[None, :], tl.sin(angle.to(tl.float32))[None, :]
        pair = pair[None, :]
        for begin in range(0, GROUPS * (QUERIES + 2), SLOT_BLOCK):
            slot = begin + tl.arange(0, SLOT_BLOCK)[:, None]
            group, place = slot // (QUERIES + 2), slot % (QUERIES + 2)
            inside = (group < GROUPS) & (pair < PAIRS)
            source = qkv + row * GROUPS * (QUERIES + 2) * 2 * PAIRS + slot * 2 * PAIRS + pair
            first = tl.load(source, inside, other=0.0).to(tl.float32)
            second = tl.load(source + PAIRS, inside, other=0.0).to(tl.float32)
            turned = place <= QUERIES
            left = tl.where(turned, first * cos - second * sin, first).to(q.dtype.element_ty)
            right = tl.where(turned, second * cos + first * sin, second).to(q.dtype.element_ty)
            head = (group * QUERIES + place) * 2 * PAIRS + pair
            target = q + row * GROUPS * QUERIES * 2 * PAIRS + head
            tl.store(target, left, inside & (place < QUERIES))
            tl.store(target + PAIRS, right, inside & (place < QUERIES))
            target = row * GROUPS * 2 * PAIRS + group * 2 * PAIRS + pair
            tl.store(k + target, left, inside & (place == QUERIES))
            tl.store(k + target + PAIRS, right, inside & (place == QUERIES))
            tl.store(v + target, left, inside & (place > QUERIES))
            tl.store(v + target + PAIRS, right, inside & (place > QUERIES))

    return rotary_forward


def _backward_kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def rotary_backward(  # type: ignore[no-untyped-def]
        dq,
        dk,
        dv,
        angles,
        dqkv,
        batch,
        q_position,
        q_sequence,
        q_head,
        k_position,
        k_sequence,
        k_head,
        v_position,
        v_sequence,
        v_head,
        QUERIES: tl.constexpr,
        GROUPS: tl.constexpr,
        PAIRS: tl.constexpr,
        SLOT_BLOCK: tl.constexpr,
        PAIR_BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        position, sequence = row // batch, row % batch
        pair = tl.arange(0, PAIR_BLOCK)
        angle = tl.load(angles + position * 2 * PAIRS + pair, pair < PAIRS, other=0.0)
        cos, sin = tl.cos(angle.to(tl.float32))[None, :], tl.sin(angle.to(tl.float32))[None, :]
        pair = pair[None, :]
        for begin in range(0, GROUPS * (QUERIES + 2), SLOT_BLOCK):
            slot = begin + tl.arange(0, SLOT_BLOCK)[:, None]
            group, place = (slot // (QUERIES + 2)).to(tl.int64), slot % (QUERIES + 2)
            inside = (group < GROUPS) & (pair < PAIRS)
            is_q, is_k, is_v = place < QUERIES, place == QUERIES, place > QUERIES
            at_q = dq + position * q_position + sequence * q_sequence
            at_q = at_q + (group * QUERIES + place) * q_head + pair
            at_k = dk + position * k_position + sequence * k_sequence + group * k_head + pair
            at_v = dv + position * v_position + sequence * v_sequence + group * v_head + pair
            left = tl.load(at_v, inside & is_v, other=0.0)
            left = tl.where(is_k, tl.load(at_k, inside & is_k, other=0.0), left)
            left = tl.where(is_q, tl.load(at_q, inside & is_q, other=0.0), left).to(tl.float32)
            right = tl.load(at_v + PAIRS, inside & is_v, other=0.0)
            right = tl.where(is_k, tl.load(at_k + PAIRS, inside & is_k, other=0.0), right)
            right = tl.where(is_q, tl.load(at_q + PAIRS, inside & is_q, other=0.0), right)
            right = right.to(tl.float32)
            first = tl.where(is_v, left, left * cos + right * sin)
            second = tl.where(is_v, right, right * cos - left * sin)
            target = dqkv + row * GROUPS * (QUERIES + 2) * 2 * PAIRS + slot * 2 * PAIRS + pair
            tl.store(target, first.to(dqkv.dtype.element_ty), inside)
            tl.store(target + PAIRS, second.to(dqkv.dtype.element_ty), inside)

    return rotary_backward


def _load() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    make_kernels()
    return split_and_rotate_triton


def split_and_rotate_triton(
    qkv: Tensor, angles: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`~samba_megatron.ops.rotary.reference.split_and_rotate_reference`, differentiable
    once in ``qkv``."""
    return _ROTARY(qkv, angles, heads, groups)


def _launch(kernel: Any, arguments: tuple[Any, ...], q: Tensor, k: Tensor) -> None:
    """One pass, a program for each row of the joined projection."""
    length, batch, heads, head_dim = q.shape
    groups, pairs = k.shape[2], head_dim // 2
    pair_block = _power_of_two(pairs)
    slot_block = min(_power_of_two(heads + 2 * groups), max(BLOCK // pair_block, 1))
    kernel[(length * batch,)](
        *arguments,
        QUERIES=heads // groups,
        GROUPS=groups,
        PAIRS=pairs,
        SLOT_BLOCK=slot_block,
        PAIR_BLOCK=pair_block,
        num_warps=max(slot_block * pair_block // (32 * _PAIRS_A_THREAD), 1),
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _run(qkv: Tensor, angles: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, groups, (heads / groups + 2) * hd] → q [s, b, heads, hd], k, v [s, b, groups, hd]."""
    q, k, v = results = _fake(qkv, angles, heads, groups)
    if qkv.numel():
        given = (qkv.contiguous(), angles.contiguous(), q, k, v, qkv.shape[1])
        _launch(make_kernels()[0], given, q, k)
    return results


def _fake(qkv: Tensor, angles: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    head_dim = qkv.shape[-1] // (heads // groups + 2)
    q, k, v = (
        qkv.new_empty((*qkv.shape[:2], number, head_dim)) for number in (heads, groups, groups)
    )
    return q, k, v


def _run_backward(dq: Tensor, dk: Tensor, dv: Tensor, angles: Tensor) -> Tensor:
    """Of q [s, b, heads, hd], k and v [s, b, groups, hd] → of the joined projection."""
    dqkv = _fake_backward(dq, dk, dv, angles)
    if dqkv.numel():
        dq, dk, dv = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk, dv))
        strides = (n for x in (dq, dk, dv) for n in x.stride()[:3])
        given = (dq, dk, dv, angles.contiguous(), dqkv, dq.shape[1], *strides)
        _launch(make_kernels()[1], given, dq, dk)
    return dqkv


def _fake_backward(dq: Tensor, dk: Tensor, dv: Tensor, angles: Tensor) -> Tensor:
    length, batch, heads, head_dim = dq.shape
    groups = dk.shape[2]
    return dq.new_empty((length, batch, groups, (heads // groups + 2) * head_dim))


def _work(q: torch.Size, k: torch.Size) -> Passes:
    return rotary_work(math.prod(q[:2]), q[2], k[2], q[3], element_size=0)


def _flops(qkv: torch.Size, angles: torch.Size, heads: int, groups: int) -> int:
    head_dim = qkv[-1] // (heads // groups + 2)
    return rotary_work(math.prod(qkv[:2]), heads, groups, head_dim, element_size=0).forward.flops


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None]:
    return _ROTARY_BACKWARD(dq, dk, dv, *ctx.saved_tensors), None, None, None


_ROTARY = define(
    "split_and_rotate(Tensor qkv, Tensor angles, int heads, int groups)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _flops,
)
_ROTARY_BACKWARD = define(
    "split_and_rotate_backward(Tensor dq, Tensor dk, Tensor dv, Tensor angles) -> Tensor",
    _run_backward,
    _fake_backward,
    lambda dq, dk, dv, angles: _work(dq, dk).backward.flops,
)
differentiate(_ROTARY, _keep, _differentiate, _ROTARY_BACKWARD)


BACKEND = Backend(
    name="triton",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset(),
    package="triton",
)
