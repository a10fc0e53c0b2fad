"""The lists of cases that are measured: each can be run, mistakes are named."""

import argparse
import runpy
from pathlib import Path

import pytest

from samba_megatron.config.load import parse_run_config
from samba_megatron.platform.errors import UserError

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "measure_training.py"))


def read(path: Path) -> list:
    return TOOL["read_cases"](argparse.Namespace(recipes=None, cases=path))


@pytest.mark.parametrize(
    "name",
    [
        "measured_cases",
        "longest_cases",
        "head_cases",
        "kernel_cases",
        "recomputation_cases",
        "graph_cases",
    ],
)
def test_the_cases_are_runs(name: str) -> None:
    cases = read(ROOT / "tools" / f"{name}.yaml")
    assert len(set(cases)) == len(cases) >= 4
    for case in cases:
        words = ["--config", case.recipe, *TOOL["PRECISIONS"][case.precision], *case.overrides]
        assert parse_run_config(words).name == case.recipe


def test_an_unknown_word_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / "cases.yaml"
    wrong.write_text("- {recipe: samba_421m, micro_batch: 8}\n")
    with pytest.raises(UserError, match="micro_batch is not known: a case has .*micro_batch_size"):
        read(wrong)
