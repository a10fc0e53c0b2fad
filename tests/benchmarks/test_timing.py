"""How often a call is timed, with which gradients, and what becomes of one without memory."""

import time

import pytest
import torch

from samba_megatron.benchmarks import cases, timing


def test_calls_fill_the_time_that_is_given() -> None:
    made = timing.time_call(lambda: time.sleep(0.01), 0.1)
    assert 3 <= made.calls <= 10
    assert 0.01 <= made.low <= made.median <= made.high
    assert timing.time_call(lambda: time.sleep(0.01), 1e-9).calls == 3


def test_a_long_call_is_timed_once(monkeypatch) -> None:
    monkeypatch.setattr(timing, "_LONG", 0.005)
    made: list[int] = []

    def call() -> None:
        made.append(1)
        time.sleep(0.01)

    found = timing.time_call(call, 10.0)
    assert found.calls == 1 and len(made) == 2
    assert found.low == found.high >= 0.01


@pytest.mark.parametrize("for_backward", [True, False])
def test_forward_alone_keeps_what_it_is_told_to(for_backward) -> None:
    x, wanted = torch.ones(3, requires_grad=True), []

    def run() -> torch.Tensor:
        wanted.append(torch.is_grad_enabled())
        return 2 * x

    forward, both = timing.time_passes(run, [x], 1e-9, for_backward)
    assert forward.calls == both.calls == 3
    assert wanted == [True] + 5 * [for_backward] + 5 * [True]


def test_memory_that_runs_out_is_one_sentence() -> None:
    def hungry():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB\nand more")

    with pytest.raises(MemoryError, match="^memory did not suffice: CUDA out .* 90 GiB$"):
        cases._alone(hungry)


def test_another_error_stays_what_it_is() -> None:
    def wrong():
        raise RuntimeError("CUDA error: an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        cases._alone(wrong)
