"""The site's file: the shipped example, and one sentence for each mistake."""

from pathlib import Path

import pytest

from samba_megatron.platform.errors import UserError
from slurm.site_settings import Site, load_site

EXAMPLE = Path(__file__).parents[2] / "slurm" / "sites" / "example.yaml"


def test_the_example_is_read() -> None:
    site = load_site(EXAMPLE)
    assert (site.partition, site.gpus_per_node, site.signal_minutes) == ("gpu", 8, 10)
    assert site.environment == {"NCCL_DEBUG": "WARN"}
    assert site.runtime.kind == "virtualenv" and site.node_check.across


def test_without_a_file_there_are_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAMBA_SITE", raising=False)
    assert load_site(None) == Site()
    monkeypatch.setenv("SAMBA_SITE", str(EXAMPLE))
    assert load_site(None) == load_site(EXAMPLE)


def test_numbers_and_switches_in_the_environment_are_text(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("environment: {NCCL_IB_TIMEOUT: 22, A: true, B: null}\n")
    assert load_site(path).environment == {"NCCL_IB_TIMEOUT": "22", "A": "true", "B": ""}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partiton: gpu", ["partiton", "partition"]),
        ("runtime: {knd: pyxis}", ["runtime.knd", "runtime.kind"]),
        ("runtime: {kind: docker}", ["docker", "apptainer"]),
        ("restart: never", ["restart", "never", "chain"]),
        ("gpus_per_node: eight", ["gpus_per_node", "eight", "whole number"]),
        ("gpus_per_node: 0", ["gpus_per_node", "over 0"]),
        ("signal_minutes: soon", ["signal_minutes", "a number"]),
        ("node_check: {enabled: 1}", ["node_check.enabled", "true or false"]),
        ("modules: cuda", ["modules", "list"]),
        ("environment: [A]", ["environment"]),
        ("srun_options: [mpi]", ["mpi", "--name=value"]),
        ("partition: [", ["not YAML"]),
        ("[]", ["fields"]),
    ],
)
def test_mistakes(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        load_site(path)
    assert all(word in str(caught.value) for word in [*words, "site.yaml"]), caught.value
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read.*example.yaml"):
        load_site(tmp_path / "none.yaml")
