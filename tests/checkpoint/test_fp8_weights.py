"""What a checkpoint has in the place of weights in FP8; with a stand-in for Transformer Engine's
tensors, which need a GPU."""

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from samba_megatron.model import fp8_weights


class _Quantized(torch.Tensor):
    """Says of itself that it is bf16."""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_weights, "is_quantized", lambda each: isinstance(each, _Quantized))


def weights() -> dict[str, Any]:
    weight = torch.zeros(4, 6, dtype=torch.bfloat16).as_subclass(_Quantized)
    norm = torch.ones(6, dtype=torch.bfloat16)
    return {
        "model0": {
            "in_proj.weight": ShardedTensor.from_rank_offsets("in_proj.weight", weight),
            "norm.weight": ShardedTensor.from_rank_offsets("norm.weight", norm),
            "in_proj._extra_state": ShardedObject("in_proj._extra_state", None, (1,), (0,)),
        }
    }


def test_what_is_saved_is_the_main_parameter_in_bf16() -> None:
    content, main = weights(), torch.linspace(-1, 1, 24).reshape(4, 6)
    norm = content["model0"]["norm.weight"].data
    state = {
        "param_state": {
            i: {"param": ShardedTensor.from_rank_offsets(f"optimizer.state.param.{key}", data)}
            for i, (key, data) in enumerate([("in_proj.weight", main), ("norm.weight", main[0])])
        },
        "param_state_sharding_type": "fully_reshardable",
    }
    fp8_weights.put_main_values(content, state)
    saved = content["model0"]["in_proj.weight"]
    assert type(saved.data) is torch.Tensor and torch.equal(saved.data, main.bfloat16())
    saved.validate_metadata_integrity()
    assert content["model0"]["norm.weight"].data is norm
    with pytest.raises(KeyError, match="in_proj"):
        fp8_weights.put_main_values(weights(), {})


def test_a_template_has_plain_memory() -> None:
    content = weights()
    fp8_weights.make_room(content)
    room = content["model0"]["in_proj.weight"]
    assert type(room.data) is torch.Tensor
    room.validate_metadata_integrity()
