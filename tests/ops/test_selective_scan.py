"""The selective scan's backends against its reference, and the reference against closed forms."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samba_megatron.ops.selective_scan import selective_scan, selective_scan_reference
from samba_megatron.ops.selective_scan.dispatch import SELECTIVE_SCAN
from samba_megatron.ops.selective_scan.recurrence import CHUNK_LENGTH
from samba_megatron.platform.errors import UserError
from tests.ops.comparing import (
    Inputs,
    Kernel,
    assert_near,
    assert_same_bits,
    in_stretches,
    run,
    to,
)

CHUNK = CHUNK_LENGTH["cpu"]
EDGES = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3]
KERNELS = [
    Kernel("torch", "cpu", torch.float64, 1e-12).param(),
    Kernel("torch", "cuda", torch.float64, 1e-12).param(),
    Kernel("mamba_ssm", "cuda", torch.float32, 2e-5).param(),
]
OPTIONAL = ("D", "z", "delta_bias", "initial_state", "reset")


def make_inputs(
    length: int, batch: int = 2, channels: int = 6, states: int = 3, seed: int = 0
) -> Inputs:
    """Every argument of the scan, in fp64, of the magnitudes that Mamba has; no document starts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "u": normal(length, batch, channels),
        "delta": normal(length, batch, channels),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(length, batch, states),
        "C": normal(length, batch, states),
        "D": normal(channels),
        "z": normal(length, batch, channels),
        "delta_bias": normal(channels) - 2,
        "initial_state": normal(batch, channels, states),
        "reset": None,
    }


def document_starts(length: int, batch: int, *starts: tuple[int, int]) -> Tensor:
    """bool [L, b], True at the given (position, sequence)."""
    reset = torch.zeros(length, batch, dtype=torch.bool)
    for position, sequence in starts:
        reset[position, sequence] = True
    return reset


def chosen(kernel: Kernel, inputs: Inputs, **options: Any) -> dict[str, Tensor]:
    """The kernel's outputs and gradients, for inputs already on its device and in its dtype."""
    return run(selective_scan, inputs, backend=kernel.backend, **options)


def features_of(inputs: Inputs) -> set[str]:
    return {name for name in ("initial_state", "reset") if inputs[name] is not None}


# The reference itself


def test_reference_sums_the_decayed_past():
    length, step, rate = 5, 0.25, 1.5
    ones = torch.ones(length, 1, 1, dtype=torch.float64)
    rates = torch.full((1, 1), -rate, dtype=torch.float64)
    y, state = selective_scan_reference(
        3 * ones, step * ones, rates, 2 * ones, 7 * ones, delta_softplus=False
    )
    decayed = [sum(math.exp(-rate * step * k) for k in range(t + 1)) for t in range(length)]
    expected = torch.tensor([step * 3 * 2 * s for s in decayed], dtype=torch.float64)
    torch.testing.assert_close(y[:, 0, 0], 7 * expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(state[0, 0, 0], expected[-1], rtol=1e-14, atol=0)


def test_reference_applies_bias_softplus_skip_and_gate():
    inputs = make_inputs(1, batch=1, channels=1, states=1)
    u, delta, B, C, D, z, bias = (
        inputs[name].item() for name in ("u", "delta", "B", "C", "D", "z", "delta_bias")
    )
    inputs["initial_state"] = None
    y, _ = selective_scan_reference(**inputs)
    step = math.log1p(math.exp(delta + bias))
    gate = z / (1 + math.exp(-z))
    assert y.item() == pytest.approx((C * B * step * u + D * u) * gate, rel=1e-14)


# Every backend against the reference


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=30, derandomize=True)
@given(
    length=st.sampled_from(EDGES) | st.integers(1, 70),
    batch=st.integers(1, 3),
    channels=st.integers(1, 9),
    states=st.integers(1, 5),
    absent=st.sets(st.sampled_from(OPTIONAL)),
    delta_softplus=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_reference(kernel, length, batch, channels, states, absent, delta_softplus, seed):
    inputs = make_inputs(length, batch, channels, states, seed)
    random = torch.Generator().manual_seed(seed)
    inputs["reset"] = torch.rand(length, batch, generator=random) < 0.15
    if not delta_softplus:
        inputs["delta"], inputs["delta_bias"] = inputs["delta"].abs(), None
    inputs |= dict.fromkeys(absent)
    if kernel.backend == "mamba_ssm":
        inputs |= {"initial_state": None, "reset": None}
    kernel.require(SELECTIVE_SCAN, features_of(inputs))
    wants_state = "final_state_gradient" in SELECTIVE_SCAN.backends[kernel.backend].features
    options = {"delta_softplus": delta_softplus}

    inputs = to(inputs, kernel.device)
    actual = chosen(kernel, to(inputs, kernel.dtype), return_final_state=wants_state, **options)
    expected = run(lambda **x: selective_scan_reference(**x)[: 1 + wants_state], inputs, **options)
    assert_near(actual, expected, kernel.tolerance)


def test_gradcheck():
    inputs = make_inputs(CHUNK + 2, batch=2, channels=2, states=2)
    inputs["reset"] = document_starts(CHUNK + 2, 2, (3, 0), (CHUNK, 1))
    names = [name for name in inputs if name != "reset"]

    def scan(*tensors: Tensor):
        arguments: Inputs = dict(zip(names, tensors, strict=True))
        return selective_scan(
            **arguments, reset=inputs["reset"], return_final_state=True, backend="torch"
        )

    assert torch.autograd.gradcheck(scan, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("step", "rate"), [(1e3, 1e3), (1e3, 1e-3), (1e-12, 1e3), (1e-12, 1e-12), (1.0, 100.0)]
)
def test_extreme_steps_and_rates(kernel, step, rate):
    kernel.require(SELECTIVE_SCAN)
    inputs = to(_extreme_inputs(step, rate), kernel.device)
    actual = chosen(kernel, to(inputs, kernel.dtype), delta_softplus=False)
    expected = run(lambda **x: selective_scan_reference(**x)[:1], inputs, delta_softplus=False)
    assert_near(actual, expected, kernel.tolerance)


@pytest.mark.parametrize(("step", "rate"), [(1e3, 1e3), (1e-12, 1e3), (1.0, 100.0)])
def test_extreme_steps_and_rates_in_fp32(step, rate):
    kernel = Kernel("torch", "cpu", torch.float32, 2e-6)
    inputs = _extreme_inputs(step, rate)
    actual = chosen(kernel, to(inputs, torch.float32), delta_softplus=False)
    rounded = to(to(inputs, torch.float32), torch.float64)
    expected = run(lambda **x: selective_scan_reference(**x)[:1], rounded, delta_softplus=False)
    assert_near(actual, expected, kernel.tolerance)


def _extreme_inputs(step: float, rate: float) -> Inputs:
    """Steps up to `step` and rates down to -`rate`, with ordinary ones among them."""
    inputs = make_inputs(2 * CHUNK + 3)
    inputs |= {"initial_state": None, "delta_bias": None}
    inputs["delta"] = inputs["delta"].abs() * step
    inputs["delta"][::5] = 0.01
    inputs["A"][::2] = -rate
    return inputs


# Documents


@pytest.mark.parametrize("position", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 2])
def test_a_document_runs_as_if_alone(position):
    """A sequence with a start inside equals its two parts run separately, gradients included."""
    kernel = Kernel("torch", "cpu", torch.float64, 1e-12)
    length = 2 * CHUNK + 3
    inputs = make_inputs(length, batch=1)
    inputs["reset"] = document_starts(length, 1, (position, 0))

    def separately(reset: Tensor, initial_state: Tensor, **tensors: Any):
        first = {k: v[:position] if v.shape[0] == length else v for k, v in tensors.items()}
        second = {k: v[position:] if v.shape[0] == length else v for k, v in tensors.items()}
        outputs = []
        if position > 0:
            outputs.append(selective_scan_reference(**first, initial_state=initial_state)[0])
        else:
            outputs.append(initial_state.sum() * tensors["u"][:0])
        y, state = selective_scan_reference(**second)
        return torch.cat([*outputs, y]), state

    expected = run(separately, inputs)
    assert_near(chosen(kernel, inputs, return_final_state=True), expected, kernel.tolerance)


@pytest.mark.parametrize("start", [1, CHUNK - 1, CHUNK, CHUNK + 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_documents_cannot_touch_each_other(start, dtype):
    """Another first document leaves the second's outputs and gradients the same bits, and v.v."""
    length = 2 * CHUNK + 3
    inputs = to(make_inputs(length, batch=2), dtype)
    inputs["reset"] = document_starts(length, 2, (start, 0), (start, 1))
    per_token = ("out0", "du", "ddelta", "dB", "dC", "dz")
    base = run(selective_scan, inputs, backend="torch")
    for changed, other in (
        (slice(0, start), slice(start, None)),
        (slice(start, None), slice(0, start)),
    ):
        per_token_inputs = ("u", "delta", "B", "C", "z")
        perturbed = inputs | {name: inputs[name].clone() for name in per_token_inputs}
        for name in per_token_inputs:
            perturbed[name][changed] *= -3
        result = run(selective_scan, perturbed, backend="torch")
        assert not torch.equal(result["out0"][changed], base["out0"][changed])
        assert_same_bits(
            {name: result[name][other] for name in per_token},
            {name: base[name][other] for name in per_token},
        )


def test_a_start_blocks_the_initial_state():
    inputs = make_inputs(4, batch=2)
    inputs["reset"] = document_starts(4, 2, (0, 1))
    result = run(selective_scan, inputs, backend="torch")
    assert result["dinitial_state"][0].abs().min() > 0
    assert (result["dinitial_state"][1] == 0).all()


# One sequence in pieces


@pytest.mark.parametrize("cut", [1, 7, CHUNK, CHUNK + 1])
def test_two_calls_equal_one(cut):
    length = 2 * CHUNK + 3
    inputs = make_inputs(length)
    inputs["reset"] = document_starts(length, 2, (4, 0), (CHUNK, 1))

    def in_two(**tensors: Any):
        state = tensors.pop("initial_state")
        outputs = []
        for piece in (slice(0, cut), slice(cut, None)):
            part = {k: v[piece] if v.shape[0] == length else v for k, v in tensors.items()}
            y, state = selective_scan(
                **part, initial_state=state, return_final_state=True, backend="torch"
            )
            outputs.append(y)
        return torch.cat(outputs), state

    expected = run(selective_scan, inputs, return_final_state=True, backend="torch")
    assert_near(run(in_two, inputs), expected, 1e-13)


# Numbers


def test_bf16_is_only_storage():
    """bf16 in, bf16 out: the same bits as fp32 arithmetic rounded at the very end."""
    inputs = to(make_inputs(CHUNK + 5, channels=16), torch.bfloat16)
    for name in ("A", "D", "delta_bias", "initial_state"):
        inputs[name] = inputs[name].float()

    def scan_in_fp32(**tensors: Any) -> Tensor:
        return selective_scan(**tensors, backend="torch")[0].bfloat16()

    wide = run(scan_in_fp32, to(inputs, torch.float32))
    narrow = run(selective_scan, inputs, backend="torch")
    assert narrow["out0"].dtype == torch.bfloat16
    for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"):
        assert narrow[f"d{name}"].dtype == inputs[name].dtype, name
    assert_same_bits(narrow, {name: wide[name].to(narrow[name].dtype) for name in wide})


CHANNEL_DIMENSION = {
    "u": 2, "delta": 2, "A": 0, "D": 0, "z": 2, "delta_bias": 0, "initial_state": 1,
    "out0": 2, "out1": 1,
}  # fmt: skip
BATCH_DIMENSION = {
    "u": 1, "delta": 1, "B": 1, "C": 1, "z": 1, "initial_state": 0, "out0": 1, "out1": 0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("dimensions", "share"),
    [({}, slice(None)), (CHANNEL_DIMENSION, slice(64, 128)), (BATCH_DIMENSION, slice(2, 4))],
    ids=["repeated", "channels", "batch"],
)
def test_bits_do_not_depend_on_the_share(dtype, dimensions, share):
    """A share of the channels or the batch, run alone, has the bits that it has in the whole."""
    inputs = to(make_inputs(2 * CHUNK + 3, batch=4, channels=128, states=16), dtype)
    whole = _with_itself_as_cotangent(inputs)
    part = _with_itself_as_cotangent(
        {name: _cut(tensor, name, dimensions, share) for name, tensor in inputs.items()}
    )
    for name, tensor in part.items():
        if not dimensions or name.removeprefix("d") in dimensions or name in dimensions:
            assert torch.equal(tensor, _cut(whole[name], name, dimensions, share)), name


def _cut(tensor: Any, name: str, dimensions: dict[str, int], share: slice):
    key = name if name in dimensions else name.removeprefix("d")
    if tensor is None or key not in dimensions:
        return tensor
    return tensor[(slice(None),) * dimensions[key] + (share,)]


def _with_itself_as_cotangent(inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients of half their squared sum: a form that knows no share."""
    leaves: Inputs = {n: t.detach().requires_grad_() for n, t in inputs.items() if t is not None}
    y, state = selective_scan(**leaves, return_final_state=True, backend="torch")
    assert state is not None
    outputs = [y, state]
    cotangents = [output.detach() for output in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    results = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return results | {"out0": cotangents[0], "out1": cotangents[1]}


def test_strided_inputs_equal_contiguous_ones():
    inputs = make_inputs(CHUNK + 3, channels=8)
    strided = dict(inputs)
    strided["u"], strided["z"] = torch.cat([inputs["u"], inputs["z"]], dim=-1).chunk(2, dim=-1)
    strided["delta"] = inputs["delta"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided["B"], strided["C"] = torch.cat([inputs["B"], inputs["C"]], dim=-1).chunk(2, dim=-1)
    expected = run(selective_scan, inputs, backend="torch")
    assert_near(run(selective_scan, strided, backend="torch"), expected, 1e-14)


def test_runs_without_gradients():
    inputs = make_inputs(40)
    with torch.no_grad():
        y, state = selective_scan(**inputs, return_final_state=True)
    expected, expected_state = selective_scan_reference(**inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)
    assert y.grad_fn is None


# Dispatch


def test_auto_takes_torch_on_a_cpu_and_remembers():
    SELECTIVE_SCAN.last_backend = None
    y, state = selective_scan(**make_inputs(3))
    assert SELECTIVE_SCAN.last_backend == "torch"
    assert state is None
    assert y.shape == (3, 2, 6)


def test_forcing_mamba_ssm_on_a_cpu_is_refused_by_name():
    with pytest.raises(UserError, match="'mamba_ssm' cannot run here: it runs on cuda.*use auto"):
        selective_scan(**make_inputs(3), backend="mamba_ssm")


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_shapes_that_do_not_fit_are_named(name):
    inputs = make_inputs(3)
    inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match=f"^{name} must be"):
        selective_scan(**inputs)


# Joined to other scans


@pytest.mark.parametrize("starts", [None, [(0, 0)], [(7, 1)], [(15, 0), (16, 0), (39, 1)]])
@pytest.mark.parametrize("length", [5, 8, CHUNK, 23])
def test_stretches_with_a_carry_are_the_whole(length, starts):
    inputs = make_inputs(40) | {"initial_state": None}
    inputs["reset"] = document_starts(40, 2, *starts) if starts else None
    expected = run(lambda **x: selective_scan(**x, backend="reference")[0], inputs)
    actual = run(lambda **x: in_stretches(selective_scan, x, length), inputs)
    assert_near(actual, expected, 1e-12)


def test_a_carry_takes_the_place_of_both_states():
    inputs = make_inputs(5)
    with pytest.raises(ValueError, match="neither an initial nor a final state"):
        in_stretches(selective_scan, inputs, 5)
    with pytest.raises(UserError, match="does not support carry; use auto or torch"):
        in_stretches(
            lambda **x: selective_scan(**x, backend="reference"),
            inputs | {"initial_state": None},
            5,
        )
