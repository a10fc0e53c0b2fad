"""Ranks that would compute by different kernels do not start to, and are named."""

from pathlib import Path

from tests.ranks import run_ranks


def test_a_rank_that_lacks_a_kernel_is_named_by_all(tmp_path: Path) -> None:
    said = run_ranks("tests.training.kernel_ranks", 2, tmp_path)
    by = "by torch_of_another_kind, and most ranks by torch: "
    for rank in range(2):
        assert f"rank {rank}, another: rank 1 on n2 would compute rms_norm {by}" in said
        refusal = "kernels.rms_norm triton cannot run here: use torch"
        assert f"rank {rank}, refusing: rank 1 on n2: {refusal}" in said
