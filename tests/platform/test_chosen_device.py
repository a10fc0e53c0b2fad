"""What --device names, on machines with and without GPUs."""

import pytest
import torch

from samba_megatron.platform.distributed import chosen_device
from samba_megatron.platform.errors import UserError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """As if so many GPUs were here; which one is set is in the list."""
    chosen: list[int] = []

    def be(count: int) -> list[int]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return be


def test_the_device(gpus) -> None:
    gpus(0)
    assert chosen_device("auto") == chosen_device("cpu") == "cpu"
    chosen = gpus(2)
    assert [chosen_device("auto", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert chosen == [0, 1, 0]
    assert chosen_device("cpu") == "cpu" and chosen_device("cuda") == "cuda"
    assert chosen_device("cuda:1") == "cuda:1" and chosen == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("count", "wanted", "said"),
    [
        (2, "gpu", "--device gpu is no device: use auto, cpu, cuda or cuda:NUMBER"),
        (0, "cuda", "--device cuda: this machine has no usable GPU; use cpu"),
        (0, "cuda:1", "--device cuda:1: this machine has no usable GPU; use cpu"),
        (2, "cuda:2", "--device cuda:2: this machine's GPUs end with cuda:1"),
    ],
)
def test_what_is_not_here(gpus, count: int, wanted: str, said: str) -> None:
    gpus(count)
    with pytest.raises(UserError) as refused:
        chosen_device(wanted)
    assert str(refused.value) == said
