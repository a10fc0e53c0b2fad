"""What the tables of a profile say, of a trace made by hand."""

from typing import Any

import pytest

from samba_megatron.training.profile_tables import describe, idle_gaps, kernel_times, kind_of
from samba_megatron.training.profile_trace import Kernel, Trace

COPY, FILL, GEMM = "void at::native::direct_copy_kernel<8>", "FillFunctor<float>", "nvjet_bf16"
MAIN, BACKWARD = 7, 8
BF16, F32 = "c10::BFloat16", "float"


def host(
    name: str, start: float, stop: float, cat: str = "cpu_op", tid: int = MAIN, **args: Any
) -> dict[str, Any]:
    """Something the host did; microseconds."""
    args = {name.replace("_", " "): value for name, value in args.items()}
    return {
        "ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": start,
        "dur": stop - start, "args": args,
    }  # fmt: skip


def launched(name: str, launch: float, start: float, stop: float, number: int, tid: int = MAIN):
    """A kernel and the 2 microseconds of its launch."""
    call = host("cudaLaunchKernel", launch, launch + 2, "cuda_runtime", tid, correlation=number)
    return [call, host(name, start, stop, "kernel", 99, correlation=number)]


def the_step() -> list[dict[str, Any]]:
    """A product, whose result the host awaits; after unnamed code the optimizer's fill; then a copy
    on autograd's thread that was launched long before it began, for a join within a module."""
    shapes: dict[str, Any] = {
        "Input_type": [F32, BF16, "Scalar"],
        "Input_Dims": [[4, 8], [4, 8], []],
    }
    shapes["Input_Strides"] = [[8, 1], [1, 4], []]
    node = "autograd::engine::evaluate_function: CatBackward0"
    return [
        host("module Attention", 0, 12, "user_annotation"),
        host("aten::cat", 10, 11),
        host("aten::mm", 90, 98),
        *launched(GEMM, 94, 100, 1000, 1),
        host("aten::item", 100, 1010),
        host("cudaStreamSynchronize", 110, 1004, "cuda_runtime", correlation=70),
        host("Optimizer.step#Adam.step", 1800, 3000, "user_annotation"),
        host("aten::zero_", 2190, 2230),
        host("aten::fill_", 2195, 2220),
        *launched(FILL, 2199, 2204, 2300, 2),
        host(node, 2000, 2400, tid=BACKWARD),
        host("CatBackward0", 2010, 2390, tid=BACKWARD),
        host("aten::contiguous", 2020, 2100, tid=BACKWARD),
        host("aten::copy_", 2030, 2090, tid=BACKWARD, **shapes),
        *launched(COPY, 2040, 2310, 2810, 3, BACKWARD),
        {"cat": "fwdbwd", "ph": "s", "id": 5, "pid": 1, "tid": MAIN, "ts": 10},
        {"cat": "fwdbwd", "ph": "f", "id": 5, "pid": 1, "tid": BACKWARD, "ts": 2010},
        host("gpu annotation", 0, 5000, "gpu_user_annotation", 99),
    ]


def times(steps: int = 1) -> dict[str, Any]:
    """The tables of it."""
    return kernel_times(Trace(the_step()), steps)


def test_idle_time_is_told_by_place_and_by_what_the_host_did() -> None:
    first, second = times()["idle"]
    assert (first["after"], first["before"], first["calls"]) == (GEMM, FILL, 1)
    assert first["milliseconds"] == pytest.approx(1.204)
    assert first["launched_by"] == "Optimizer.step#Adam.step > aten::zero_ > aten::fill_"
    assert first["host"] == pytest.approx(
        {
            "unnamed code after aten::item": 0.790,
            "Optimizer.step#Adam.step: unnamed code": 0.390,
            "Optimizer.step#Adam.step > aten::zero_ > aten::fill_": 0.006,
            "aten::item": 0.006,
            "Optimizer.step#Adam.step > aten::zero_": 0.005,
        }, abs=1e-9,
    )  # fmt: skip
    assert second["launched_by"] == "Attention > CatBackward0 > aten::contiguous > aten::copy_"
    assert second["host"]["already launched"] == pytest.approx(0.010)
    assert sum(second["host"].values()) == pytest.approx(second["milliseconds"])


def test_gaps_at_one_place_are_one_row() -> None:
    """The same step again 10 ms later."""
    again = [
        {**event, "ts": event["ts"] + 10_000, "args": {"correlation": number + 100}}
        if (number := event.get("args", {}).get("correlation"))
        else {**event, "ts": event["ts"] + 10_000, "id": 6}
        for event in the_step()
    ]
    twice = kernel_times(Trace(the_step() + again), 2)
    between, first, second = twice["idle"]
    assert (between["after"], between["before"], between["calls"]) == (COPY, GEMM, 0.5)
    for row, alone in zip((first, second), times()["idle"], strict=True):
        host_alone = alone.pop("host")
        assert row.pop("host") == pytest.approx(host_alone)
        assert row == pytest.approx(alone)
    assert twice["kinds"]["idle"] == pytest.approx(
        sum(row["milliseconds"] for row in twice["idle"])
    )


def test_copies_are_told_by_operator_and_what_it_was_given() -> None:
    copy, fill = times()["operators"]
    assert copy == {
        "kind": "copies",
        "operator": "Attention > CatBackward0 > aten::contiguous > aten::copy_",
        "inputs": "f32[4, 8], bf16[4, 8] by [1, 4]",
        "calls": 1.0,
        "milliseconds": 0.5,
        "kernel": COPY,
    }
    assert (fill["operator"], fill["inputs"]) == (
        "Optimizer.step#Adam.step > aten::zero_ > aten::fill_",
        "",
    )


def test_a_launch_on_a_thread_of_another_number_is_found_by_its_id() -> None:
    events = [
        host("aten::copy_", 10, 30, External_id=41),
        host("cudaMemcpyAsync", 12, 14, "cuda_driver", -5, correlation=1, External_id=41),
        host("Memcpy HtoD", 20, 40, "gpu_memcpy", 99, correlation=1),
        host("Memset", 50, 60, "gpu_memset", 99, correlation=2),
    ]
    tables = kernel_times(Trace(events), 1)
    assert [row["operator"] for row in tables["operators"]] == [
        "aten::copy_ > cudaMemcpyAsync",
        "unknown",
    ]
    assert tables["idle"][0]["launched_by"] == "unknown"
    assert tables["idle"][0]["host"] == {}


def test_the_text_has_the_largest_and_the_sum_of_the_rest() -> None:
    tables = times()
    row = tables["idle"][1]
    text = describe({**tables, "idle": tables["idle"] + [row] * 20})
    assert "      1.204     1.0  nvjet_bf16 -> FillFunctor<float>\n" in text
    assert "launched by Optimizer.step#Adam.step > aten::zero_ > aten::fill_\n" in text
    assert (
        "host: 66 % unnamed code after aten::item; 32 % Optimizer.step#Adam.step: unnamed" in text
    )
    assert "      0.070     7.0  at 7 other places\n" in text
    assert (
        "[copies] Attention > CatBackward0 > aten::contiguous > aten::copy_ (f32[4, 8], bf" in text
    )
    assert " direct_copy_kernel<8>\n" in text


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("scan_backward", "selective scan"),
        ("void causal_conv1d_channellast_fwd_kernel<...>", "convolution"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(...)", "communication"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_gaps_are_where_nothing_runs() -> None:
    """Two streams: the second kernel runs beside the first and beyond it."""
    a, b, c = Kernel("a", 0, 1000), Kernel("b", 500, 1500), Kernel("c", 4500, 5000)
    (gap,) = idle_gaps([a, b, c])
    assert (gap.milliseconds, gap.after, gap.before) == (3.0, b, c)


def test_the_table_is_by_what_takes_longest() -> None:
    text = describe(times())
    assert "     1.21   44.8 %  idle" in text
    assert text.index("matrix products") < text.index("%  copies")
