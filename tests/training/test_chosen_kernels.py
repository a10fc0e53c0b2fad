"""Ranks that would compute by different kernels do not start to, and are named."""

from pathlib import Path

from samba_megatron.tracking import ledger
from tests.ranks import run_ranks


def test_a_node_that_lacks_a_kernel_is_named_by_all_and_left_out(tmp_path: Path) -> None:
    said = run_ranks("tests.training.kernel_ranks", 3, tmp_path)
    sentences = {
        "another_1": "rank 1 on n2 has rms_norm kind_1, and others have torch: ",
        "refusing_1": "rank 1 on n2: kernels.rms_norm triton cannot run here: use torch",
        "another_2": "rank 1 on n2 has rms_norm kind_1, and others have torch: ",
    }
    for run, sentence in sentences.items():
        for rank in range(3):
            assert f"rank {rank}, {run}: {sentence}" in said
    ends = {run: ledger.read(tmp_path / run, "end")[0] for run in sentences}
    for run in ("another_1", "refusing_1"):
        assert (ends[run]["code"], ends[run]["bad_node"]) == (77, "n2")
    assert ends["another_2"]["code"] == 2 and "bad_node" not in ends["another_2"], "of two nodes"
