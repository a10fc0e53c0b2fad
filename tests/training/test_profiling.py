"""A profile of real steps, and what its tables say."""

import gzip
import json
from pathlib import Path

import pytest

from samba_megatron.training.profiling import describe, idle_gaps, kind_of
from tests.distributed.toy import launch, toy_config, write_dataset


def test_a_run_profiles_the_steps_that_it_is_asked_to(tmp_path: Path) -> None:
    fields = {"logging.profile_step_start": 2, "logging.profile_step_end": 4}
    config = toy_config(write_dataset(tmp_path), tmp_path / "run", **fields)
    launch(1, [{"name": "profiled", "config": {**config, "training.train_steps": 4}}], tmp_path)
    folder = tmp_path / "run" / "profile" / "rank_0"
    times = json.loads((folder / "kernels.json").read_text())
    assert times["steps"] == 2
    assert times["kinds"]["matrix products"] > 0
    assert sum(times["kinds"].values()) == pytest.approx(
        sum(kernel["milliseconds"] for kernel in times["kernels"])
    )
    # 4 micro-batches, 2 MLPs and 2 attentions of 2 linears each, forward and twice backward.
    products = sum(k["calls"] for k in times["kernels"] if k["name"] in ("aten::mm", "aten::addmm"))
    assert products >= 4 * (2 * 2 * 2 + 2 * 2) * 3
    assert "matrix products" in (folder / "kernels.txt").read_text()
    with gzip.open(folder / "trace.json.gz") as trace:
        assert json.load(trace)["traceEvents"]


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
    events = [
        {"name": name, "ts": start, "dur": end - start}
        for name, start, end in (("a", 0, 1000), ("b", 500, 1500), ("c", 4500, 5000))
    ]
    assert idle_gaps(events) == [{"milliseconds": 3.0, "after": "b", "before": "c"}]


def test_the_table_is_by_what_takes_longest() -> None:
    kernel = {"name": "k", "kind": "other", "milliseconds": 3.0, "calls": 1.0}
    gap = {"milliseconds": 0.25, "after": "k", "before": "k"}
    times = {"steps": 1, "kinds": {"other": 3.0}, "kernels": [kernel], "longest_gaps": [gap]}
    text = describe(times)
    assert "3.00  100.0 %  other" in text
    assert "0.250  k -> k" in text
