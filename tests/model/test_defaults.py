"""What is chosen where nothing is named: this project's norm and rotary embedding, and no kernel
for more numbers than it can count."""

import dataclasses
from typing import Any

import pytest
import torch

from samba_megatron.config import RunConfig
from samba_megatron.config.load import parse_run_config
from samba_megatron.model.backend import has_own_norm
from samba_megatron.model.rotary import splits_and_rotates
from samba_megatron.model.transformer_config import counts_rotary_in_32_bits, tokens_at_once
from samba_megatron.ops.causal_conv1d.dispatch import CAUSAL_CONV1D
from samba_megatron.ops.registry import Backend, Request, span
from samba_megatron.ops.rms_norm import triton_rms_norm
from samba_megatron.ops.rotary import triton_rotary
from samba_megatron.ops.selective_scan.dispatch import SELECTIVE_SCAN


def config(**fields: Any) -> RunConfig:
    """Samba 1.3B with further fields."""
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return parse_run_config(["--config", "samba_1.3b", *words])


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU."""
    monkeypatch.setattr(Backend, "unavailable", lambda backend: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_a_machine_without_triton_keeps_what_others_have() -> None:
    assert triton_rms_norm.BACKEND.unavailable() and triton_rotary.BACKEND.unavailable()
    run = config()
    assert not has_own_norm(run) and not splits_and_rotates(run.model, run.kernels, 1)


def test_own_kernels_where_they_can_run(with_triton: None) -> None:
    run = config()
    assert has_own_norm(run) and splits_and_rotates(run.model, run.kernels, 1)
    named = config(**{"kernels.rms_norm": "transformer_engine", "kernels.rotary": "megatron"})
    assert not has_own_norm(named) and not splits_and_rotates(named.model, named.kernels, 1)
    assert not has_own_norm(config(**{"precision.fp32_residual_connection": True}))
    wide = dataclasses.replace(run.model, hidden_size=2 * triton_rms_norm.WIDEST)
    assert not has_own_norm(dataclasses.replace(run, model=wide))
    assert not splits_and_rotates(run.model, run.kernels, 2 * run.model.kv_heads)


def rows(**fields: Any) -> RunConfig:
    return config(**{"training.micro_batch_size": 1, "training.global_batch_size": 8, **fields})


def test_the_most_tokens_at_once() -> None:
    assert tokens_at_once(config(**{"training.micro_batch_size": 8})) == 8 * 4096
    assert tokens_at_once(rows(**{"validation.sequence_lengths": "[4096,65536]"})) == 65536
    pieces = {"parallel.sequence_pieces": 4, "data.sequence_length": 65536}
    assert tokens_at_once(rows(**pieces)) == 16384
    assert tokens_at_once(rows(**pieces, **{"validation.sequence_lengths": "[1048576]"})) == 16384
    shared = {"parallel.context_parallel_size": 2, "data.sequence_length": 65536}
    assert tokens_at_once(rows(**shared)) == 32768


def test_a_rotary_kernel_that_counts_in_32_bits_is_given_no_more() -> None:
    """54 heads of 128 numbers: 310,689 positions are 2^31."""
    assert counts_rotary_in_32_bits(rows(**{"data.sequence_length": 310_688}))
    assert not counts_rotary_in_32_bits(rows(**{"data.sequence_length": 310_720}))
    assert not counts_rotary_in_32_bits(rows(**{"validation.sequence_lengths": "[327680]"}))
    split = {"data.sequence_length": 327_680, "parallel.tensor_model_parallel_size": 2}
    assert counts_rotary_in_32_bits(rows(**split))
    shared = rows(**split, **{"model.num_query_groups": 1})
    wider = dataclasses.replace(shared.data, sequence_length=1_048_576)
    assert not counts_rotary_in_32_bits(dataclasses.replace(shared, data=wider))


def test_packages_are_given_what_they_can_count() -> None:
    x = torch.empty(6, 2, 10)[:, :, :5]
    assert span(x) == 5 * 20 + 10 + 5
    sizes = {"channels": 8, "width": 4, "d_state": 16, "span": 1 << 32}
    request = Request("cuda", torch.bfloat16, frozenset(), sizes)
    for operation, package in ((CAUSAL_CONV1D, "causal_conv1d"), (SELECTIVE_SCAN, "mamba_ssm")):
        kernel = operation.backends[package]
        assert "counts in 32 bits" in (kernel.refuses(request) or "")
        fewer = dataclasses.replace(request, sizes=sizes | {"span": (1 << 32) - 1})
        assert kernel.refuses(fewer) is None
